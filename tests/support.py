"""Helpers that tests import by name: a tiny run's overrides, a run read back, train.py as a process."""

from __future__ import annotations

import csv
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ranker import stop_signals

ROOT = Path(__file__).resolve().parent.parent

# A stream and a model small enough for seconds; the window is smaller than the stream, so that it moves.
TINY = (
    "logger=csv",
    "trainer=cpu",
    "scale.batch_size=256",
    "scale.eval_batch_size=2048",
    "data.log.train_rows=6144",
    "data.log.eval_rows=2048",
    "data.log.rows_per_day=2048",
    "data.log.num_users=500",
    "data.log.num_items=200",
    "data.window=2048",
    "data.num_workers=1",
    "train.eval_every=8",
    "train.threads=1",
    "train.warmup_steps=0",  # so few steps leave no time for one
    "data.base_lr.laptop=0.4",  # the tests do not move with the data set's own 1x
    "++model.widths.small.laptop=[16,16]",
    "++model.widths.large.laptop=[16,16,16,16]",
    "++model.widths.moe.laptop=[8,8]",
    "++model.widths.ple.laptop=[8,8]",
)


CALM = ("data.log.difficulty.jump_share=0", "data.log.difficulty.tail=0")  # the stream itself has no jumps
TWO_RANKS = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")


@dataclass(frozen=True)
class Finished:
    """What a run left: its folder and its summary."""

    folder: Path
    summary: dict[str, Any]


def finished(folder: Path) -> Finished:
    return Finished(folder, json.loads((folder / "summary.json").read_text()))


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, without what a row does not hold."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def train_process(
    *overrides: str, path: Path | None = None, variables: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Starts ``python train.py`` as a user would; ``path`` is a folder to import from."""
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"} | dict(variables or {})
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.pop("HYDRA_FULL_ERROR", None)
    return start([sys.executable, str(ROOT / "train.py"), *overrides], environment, **options)


# In the environment of what tests start, and of whatever that starts.
_MARK = ("EVENKEEL_TEST", secrets.token_hex(8))
_started: list[subprocess.Popen[str]] = []


def start(command: Sequence[str], environment: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
    """Starts a process in the project's folder. What is left of it and of its own processes ends with the test.

    It ignores no signal, though pytest does behind nohup, or with & in a script.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ignored = [number for number in stop_signals.SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    try:
        for number in ignored:
            signal.signal(number, signal.SIG_DFL)
        environment = {**environment, _MARK[0]: _MARK[1]}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes, **options)
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
    _started.append(process)
    return process


def end_processes() -> None:
    """Kills what is left of the processes of ``start`` and of those they have started, whoever their parents are."""
    if not _started:
        return
    mark, own = "=".join(_MARK).encode(), os.getpid()
    left = True
    while left:  # one that is about to die may start another
        left = False
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended
                if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != own:
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    left = True
    for process in _started:
        with process:  # closes its pipes and waits
            process.kill()
    _started.clear()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, with that of its threads."""
    user, system = _stat(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def slowness(pid: int) -> float:
    """How many times longer than alone on a machine a process has taken so far: its age over its CPU time, 1 or more.

    A limit in seconds that holds on an idle machine, times this, holds on a busy one.
    """
    up = float(Path("/proc/uptime").read_text().split()[0])
    age = up - int(_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")
    return max(1.0, age / max(cpu_seconds(pid), 0.1))


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def newest_checkpoint(folder: Path) -> dict[str, Any]:
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    return torch.load(newest, weights_only=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits as long as the process lives. The test's timeout ends it where nothing happens."""
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of a run with two ranks on this machine: the one that was started, and the one it started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    named = [pid for pid in children if b"train_ddp_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(named) == 1
    return [process.pid, int(named[0])]


def assert_equal(expected: Any, got: Any, where: str = "state") -> None:
    """Compares nested containers of tensors and plain values, tensors to the bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, got), where
    elif isinstance(expected, dict):
        assert expected.keys() == got.keys(), where
        for key, value in expected.items():
            assert_equal(value, got[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(got), where
        for place, pair in enumerate(zip(expected, got, strict=True)):
            assert_equal(*pair, f"{where}[{place}]")
    else:
        assert expected == got, where


def plain(state: Any) -> str:
    """A saved state as text, to compare two: nan equals nan, and tensors count by their values."""
    return json.dumps(state, sort_keys=True, default=Tensor.tolist)
