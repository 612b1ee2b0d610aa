"""Times of steps inside a process that takes turns with another one, for bench_step.py."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from pytorch_lightning.callbacks import Callback

CLOCKS = ("wall", "thread", "process")
Reading = tuple[float, float, float]


def read() -> Reading:
    """Seconds of wall time, of CPU time of this thread, and of CPU time of all threads of the process."""
    return time.perf_counter(), time.thread_time(), time.process_time()


class Turns:
    """Measures blocks of steps. Before each it waits for its turn, and after each it says how long the block took.

    Args:
        fd: a socket to bench_step.py.
        skip: first steps that are left out.
        block: steps in a block.
    """

    def __init__(self, *, fd: int, skip: int, block: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._skip, self._block = skip, block
        self._step = -skip
        self._began: Reading | None = None

    def before_step(self) -> None:
        """Call it where a step begins."""
        if self._step >= 0 and self._step % self._block == 0:
            took: list[float] = []
            if self._began is not None:
                took = [(now - then) / self._block for now, then in zip(read(), self._began, strict=True)]
            self._socket.sendall(json.dumps(took).encode() + b"\n")
            self._socket.recv(1)
            self._began = read()
        self._step += 1


class StepClock(Callback):
    """``Turns`` of a run.

    Args:
        turns: arguments of ``Turns``.
    """

    def __init__(self, **turns: int) -> None:
        self._turns = Turns(**turns)

    def on_train_batch_start(self, *_: Any) -> None:
        """The beginning of a step."""
        self._turns.before_step()
