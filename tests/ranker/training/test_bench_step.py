"""The benchmark of a step: turns of processes, and the ratios of its table."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest


@pytest.fixture
def bench(load_script: Any) -> Any:
    return load_script("bench_step")


def test_a_block_is_measured_only_while_it_is_the_turn_of_the_process(load_script: Any) -> None:
    clock = load_script("step_clock")
    ours, theirs = socket.socketpair()
    turns = clock.Turns(fd=theirs.detach(), skip=2, block=3)
    lines = ours.makefile("r")
    trained: list[int] = []

    def train() -> None:
        for step in range(9):
            turns.before_step()
            trained.append(step)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    assert json.loads(lines.readline()) == [], "warmed up"
    assert trained == [0, 1]
    ours.send(b".")
    wall, cpu, process = json.loads(lines.readline())
    assert trained == [0, 1, 2, 3, 4]
    assert min(wall, cpu, process) > 0
    ours.send(b".")
    lines.readline()
    assert trained == list(range(8))
    ours.send(b".")
    thread.join(5)
    for thing in (lines, ours, turns._socket):
        thing.close()


def test_a_ratio_is_the_median_of_those_of_rounds_and_is_held_against_the_goal(bench: Any) -> None:
    one = {"bare": [1.0, 1.0, 1.0], "train": [1.2, 1.1, 1.3], "train_without_progressive": [1.0, 1.0, 1.0]}
    slow = {"bare": [4.0, 4.0, 4.0], "train": [4.4, 4.4, 4.8], "train_without_progressive": [4.0, 4.0, 4.0]}
    row = bench.summary("small", 256, [one, one, slow])

    assert row["train_wall_ratio"] == pytest.approx(1.2)
    assert row["train_thread_ratio"] == pytest.approx(1.1)
    assert row["bare_wall_ms"] == pytest.approx(1000.0)
    assert bench.goal(row) == 1.15
    assert bench.goal(row | {"model": "large", "batch": 1024}) == 1.03
    assert bench.goal(row | {"batch": 64}) is None
    assert bench.markdown([row]).splitlines()[-1] == "| Small | 256 | 1000.00 | 1.10 | 1.20 | 1.00 | 1.00 | 1.15 | 3 |"


def test_a_process_that_fails_is_named_with_its_last_line(bench: Any) -> None:
    process = bench.Process(["/bin/sh", "-c", "echo no such model >&2; exit 3"], threads=1)
    with pytest.raises(RuntimeError, match="no such model"):
        process.wait()
    process.end()
