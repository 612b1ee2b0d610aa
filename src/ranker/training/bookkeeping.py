"""The callback that keeps a run resumable: bookkeeping after each batch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ranker.data.batch import Batch
from ranker.errors import UserError
from ranker.runs.run_folder import TRACKED
from ranker.training import trackers
from ranker.training.fit import Fit
from ranker.training.free_memory import FreeMemory
from ranker.training.lightning_private import with_more_batches


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
    warming caches. In a run of no more batches than these, it is that of all.

    Args:
        skip_batches: number of first batches that are left out once there are others.

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
        self._first = (0, 0.0, 0.0)  # rows, seconds and seconds waited of the first batches
        self._started = 0.0
        self._waited_before = 0.0
        self._loader: Timed | None = None

    def examples_per_second(self) -> float:
        """Rows trained on per second, over all ranks; 0 before the first batch."""
        rows, seconds, _ = self._measured()
        return rows / seconds if seconds else 0.0

    def data_wait_fraction(self) -> float:
        """Share of the training time in which the model waited for its next batch, 0 to 1."""
        _, seconds, waited = self._measured()
        return waited / seconds if seconds else 0.0

    def timed(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Wraps the training loader so that waiting for it is measured."""
        self._loader = Timed(loader)
        return self._loader

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock, after the optimizer has the settings of this run: a snapshot may be taken next."""
        Fit(trainer).module.apply_settings()
        self._resume_clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Keeps the books of one batch."""
        fit = Fit(trainer)
        fit.data.advance(batch)
        fit.module.collect_rows()
        fit.module.update_average()
        fit.module.record_step()
        rows = fit.data.plan.size(batch.number)  # of all ranks, whose shares may differ by one
        self._batches += 1
        self.examples += rows
        self._stop_clock()
        self._rows += rows
        if self._batches == self._skip:  # what is measured from here on replaces what was
            self._first = (self._rows, self._seconds, self._waited)
            self._rows, self._seconds, self._waited = 0, 0.0, 0.0
        self._resume_clock()
        FreeMemory.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Sends the last rows, also of a batch that did not end. A disk that is full has said so already."""
        with suppress(UserError):
            Fit(trainer).module.send_rows()

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
        Fit(trainer).module.send_rows(keep_on=True)
        for logger in trainer.loggers:
            logger.save()
        checkpoint[TRACKED] = trackers.position(trainer.loggers)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets a run go on whose last batch was not the last one of the run, whatever the checkpoint's epoch says."""
        data = Fit(trainer).data
        if data.position < data.num_batches:  # the data module was restored before
            with_more_batches(checkpoint)

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
        self._seconds += time.perf_counter() - self._started
        self._waited += (self._loader.waited if self._loader else 0.0) - self._waited_before

    def _measured(self) -> tuple[int, float, float]:
        """Rows, seconds and seconds waited: of the batches after the first ones, or of those if there are no others."""
        return (self._rows, self._seconds, self._waited) if self._rows else self._first
