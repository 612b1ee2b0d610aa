"""A callback that writes down what a long run costs while it runs, for bench_length.py."""

# ruff: noqa: ARG002  # the hooks of a Lightning callback have fixed arguments
from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class Ledger(pl.Callback):
    """Appends JSON lines: at the first step what the start cost, then every few steps CPU time, memory and rows.

    Args:
        path: the file.
        every: steps between two lines.
        batch_size: rows of a step.
    """

    def __init__(self, path: str, every: int, batch_size: int) -> None:
        self._path, self._every, self._rows = Path(path), every, batch_size
        self._aside = 0.0  # CPU seconds of evaluations and checkpoints
        self._thread_aside = 0.0  # and those of this thread alone
        self._began: float | None = None
        self._first = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures each checkpoint."""
        save = trainer.save_checkpoint

        def measured(*args: Any, **options: Any) -> None:
            cpu, thread, wall = time.process_time(), time.thread_time(), time.perf_counter()
            save(*args, **options)
            spent, own = time.process_time() - cpu, time.thread_time() - thread
            self._aside += spent
            self._thread_aside += own
            seconds = time.perf_counter() - wall
            self._write(checkpoint=trainer.global_step, cpu=spent, thread=own, seconds=seconds)

        trainer.save_checkpoint = measured  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes what the process cost until its first step."""
        if self._first:
            self._first = False
            self._write(start=trainer.global_step, cpu=time.process_time())

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        """Writes a line if one is due."""
        step = trainer.global_step
        if step % self._every == 0:
            self._write(
                step=step,
                rows=step * self._rows,
                cpu=time.process_time() - self._aside,
                thread=time.thread_time() - self._thread_aside,
                wall=time.time(),
                megabytes=anonymous_megabytes(),
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An evaluation begins."""
        self._began = time.process_time()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An evaluation has ended."""
        if self._began is not None:
            self._aside += time.process_time() - self._began

    def _write(self, **values: float) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def anonymous_megabytes() -> float:
    """Memory of this process without pages of files, which the system takes back when it needs them."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) / 1024 if found else float("nan")
