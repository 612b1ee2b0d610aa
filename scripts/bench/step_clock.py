"""Times of steps inside a run, for bench_step.py: wall time, CPU time of the training thread and of the process."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback

Reading = tuple[float, float, float]
CLOCKS = ("wall_ms", "thread_ms", "process_ms")


def read() -> Reading:
    """Seconds of wall time, of CPU time of this thread, and of CPU time of all threads of the process."""
    return time.perf_counter(), time.thread_time(), time.process_time()


def per_step(readings: Sequence[Reading], *, block: int) -> dict[str, float]:
    """Milliseconds of a step by clock: the mean of a block of steps, and the median of these over blocks.

    A block is long enough to have its share of what comes once in many steps, such as a snapshot. The median leaves
    blocks out in which other work of the machine came between.

    Args:
        readings: at the beginning of each step.
        block: steps of a block; fewer where there are not so many.
    """
    block = min(block, len(readings) - 1)
    ends = readings[::block]
    means = [[1e3 * (b - a) / block for a, b in zip(first, then, strict=True)] for first, then in pairwise(ends)]
    return {name: statistics.median(values) for name, values in zip(CLOCKS, zip(*means, strict=True), strict=True)}


class StepClock(Callback):
    """Writes the times of a run's steps to a file, when training ends.

    Args:
        path: the file.
        skip: first steps that are left out.
        block: see ``per_step``.
    """

    def __init__(self, *, path: str, skip: int, block: int) -> None:
        self._path, self._skip, self._block = Path(path), skip, block
        self._readings: list[Reading] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Reads the clocks."""
        self._readings.append(read())

    def on_train_end(self, *_: Any) -> None:
        """Writes the file."""
        found = per_step(self._readings[self._skip :], block=self._block)
        self._path.write_text(json.dumps(found), encoding="utf-8")
