"""Callbacks that keep a run resumable: bookkeeping after each batch, stopping on request, and the newest checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from ranker.data.batch import Batch
from ranker.runs.run_folder import RunFolder
from ranker.training.module import Fit


class Timed:
    """An iterable that measures how long its consumer waits for the next item.

    Args:
        items: what to iterate over.

    Attributes:
        waited: seconds waited so far, over all iterations.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items
        self.waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self.items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield item


class Bookkeeping(Callback):
    """After each batch: moves the position in the log, writes the step's metrics and measures the speed.

    Must be the first callback. A checkpoint of this step may be written by a later callback (Lightning's
    ModelCheckpoint is one), before the module's own hook is called, and must know the position and have the row of
    metrics: a process killed in between would otherwise resume after a step whose row nobody has.

    Speed is measured without the time spent evaluating, and without the first batches, which pay for opening files and
    warming caches.

    Args:
        skip_batches: number of first batches that are not measured.

    Attributes:
        examples: rows trained on so far, over all ranks.
    """

    def __init__(self, *, skip_batches: int = 5) -> None:
        self.examples = 0
        self._skip = skip_batches
        self._batches = 0
        self._rows = 0
        self._seconds = 0.0
        self._waited = 0.0
        self._started = 0.0
        self._waited_before = 0.0
        self._loader: Timed | None = None

    def examples_per_second(self) -> float:
        """Rows trained on per second, over all ranks; 0 before anything was measured."""
        return self._rows / self._seconds if self._seconds else 0.0

    def data_wait_fraction(self) -> float:
        """Share of the training time in which the model waited for its next batch, 0 to 1."""
        return self._waited / self._seconds if self._seconds else 0.0

    def timed(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Wraps the training loader so that waiting for it is measured."""
        self._loader = Timed(loader)
        return self._loader

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._resume_clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Keeps the books of one batch."""
        fit = Fit(trainer)
        fit.data.advance(batch)
        fit.module.record_step()
        rows = fit.data.plan.size(batch.number)  # of all ranks, whose shares may differ by one
        self._batches += 1
        self.examples += rows
        if self._batches > self._skip:
            self._stop_clock()
            self._rows += rows
        self._resume_clock()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock while the hold-out is evaluated."""
        self._stop_clock()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock again."""
        self._resume_clock()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Has the loggers write what they hold: a resumed run continues after the checkpoint's step."""
        for logger in trainer.loggers:
            logger.save()

    def state_dict(self) -> dict[str, Any]:
        """The count of examples."""
        return {"examples": self.examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a checkpoint's count."""
        self.examples = state_dict["examples"]

    def _resume_clock(self) -> None:
        self._started = time.perf_counter()
        self._waited_before = self._loader.waited if self._loader else 0.0

    def _stop_clock(self) -> None:
        if self._batches > self._skip:
            self._seconds += time.perf_counter() - self._started
            self._waited += (self._loader.waited if self._loader else 0.0) - self._waited_before


class Interruption(Callback):
    """Ends training between two steps on Ctrl-C or SIGTERM, with a checkpoint. A second Ctrl-C stops at once.

    An exception at an arbitrary point of the program could leave weights half updated, and resuming from those would
    not give the numbers of an uninterrupted run. All ranks agree on the request first, so they stop at the same step.
    Must come after the callbacks whose state belongs into the checkpoint of this step.

    Args:
        folder: where the checkpoint goes.

    Attributes:
        stopped: whether training ended because of a request.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.stopped = False
        self._folder = folder
        self._requested = False
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes over the two signals during training; only the main thread may."""
        if stage == "fit" and threading.current_thread() is threading.main_thread() and not self._handlers:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops here if it was requested on any rank."""
        if not Fit(trainer).largest(int(self._requested)):
            return
        self.stopped = True
        trainer.save_checkpoint(self._folder.checkpoints / f"step={trainer.global_step}.ckpt")
        trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores the signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)


class NewestCheckpoint(ModelCheckpoint):
    """Writes a checkpoint at a fixed interval and then removes the previous one, so that one is always complete.

    Args:
        folder: where they go, named after their step.
        every: steps between two checkpoints; 0 writes none.
    """

    def __init__(self, folder: Path, *, every: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="{step}",
            every_n_train_steps=every,
            save_top_k=1 if every else 0,
            save_last=False,
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        """Without the interval, which Lightning includes: a run may resume with another interval."""
        return type(self).__qualname__
