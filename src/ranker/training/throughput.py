"""How fast training is, and how much of it is waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ranker.data.batch import Batch
from ranker.data.datamodule import RankingDataModule

T = TypeVar("T")


class Timed(Generic[T]):
    """An iterable that adds up the time its consumer waits for the next item.

    Args:
        items: what to iterate over.

    Attributes:
        waited: seconds waited so far, over all iterations.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self.items = items
        self.waited = 0.0

    def __iter__(self) -> Iterator[T]:
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


class Throughput(Callback):
    """Examples a second and the share of time spent waiting for data, both without the time spent evaluating.

    The first batches are left out: they pay for opening files and warming caches.

    Args:
        skip_batches: number of first batches to leave out.
    """

    def __init__(self, *, skip_batches: int = 5) -> None:
        self.examples = 0
        self._skip = skip_batches
        self._seen = 0
        self._rows = 0
        self._seconds = 0.0
        self._waited = 0.0
        self._started = 0.0
        self._waited_before = 0.0
        self._loader: Timed[Batch] | None = None

    @property
    def examples_per_second(self) -> float:
        """Rows trained on a second, over all ranks; 0 before anything was measured."""
        return self._rows / self._seconds if self._seconds else 0.0

    @property
    def data_wait_fraction(self) -> float:
        """Share of the training time in which the model waited for its next batch, 0 to 1."""
        return self._waited / self._seconds if self._seconds else 0.0

    def watch(self, loader: Iterable[Batch]) -> Timed[Batch]:
        """Wraps the training loader so that waiting for it is measured."""
        self._loader = Timed(loader)
        return self._loader

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._resume_clock()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Counts a batch."""
        datamodule: RankingDataModule = trainer.datamodule  # type: ignore[attr-defined]
        rows = datamodule.plan.size(batch.number)  # of all ranks, whose shares may differ by one
        self._seen += 1
        self.examples += rows
        if self._seen > self._skip:
            self._stop_clock()
            self._rows += rows
        self._resume_clock()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock while the hold-out is evaluated."""
        self._stop_clock()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts it again."""
        self._resume_clock()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        return {"examples": self.examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint's count."""
        self.examples = state_dict["examples"]

    def _resume_clock(self) -> None:
        self._started = time.perf_counter()
        self._waited_before = self._loader.waited if self._loader else 0.0

    def _stop_clock(self) -> None:
        if self._seen > self._skip:
            self._seconds += time.perf_counter() - self._started
            self._waited += (self._loader.waited if self._loader else 0.0) - self._waited_before
