"""The example of the README, run as a script."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import optim

SOURCES = Path(optim.__file__).parents[1]
README = Path(optim.__file__).with_name("README.md")
SCRIPT = Path("examples/adagrad_diverges_clippy_does_not.py")


def test_the_example_diverges_with_adagrad_and_not_with_clippy_in_ten_seconds() -> None:
    assert f"python {SCRIPT}" in README.read_text()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, str(SOURCES.parent / SCRIPT)],
        env={**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worst, last, first = {}, {}, {}
    header, start, *_ = lines = run.stdout.splitlines()
    first = dict(zip(header.split()[1:], map(float, start.split()[1:]), strict=True))
    for line in lines[-2:]:
        name, _, numbers = line.partition(": worst ")
        worst[name], last[name] = (float(number) for number in numbers.split(", mean of the last 50 "))
    assert first["adagrad"] == first["clippy"]
    assert worst["adagrad"] > 1000 * first["adagrad"]
    assert worst["clippy"] < 2 * first["clippy"]
    assert last["clippy"] < first["clippy"] / 4 < last["adagrad"]
    # CPU time, because wall-clock time depends on the load of the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
