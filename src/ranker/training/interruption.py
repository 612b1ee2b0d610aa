"""Ends training, or an evaluation, on request of a signal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ranker import stop_signals
from ranker.training.fit import Fit


class Interruption(Callback):
    """Ends training between two steps where a signal asked for it, and an evaluation between two batches.

    An exception at an arbitrary point of the program could leave weights half updated, and resuming from those would
    not give the numbers of an uninterrupted run. All ranks agree on the request first, so they stop at the same step.
    ``Checkpoints`` comes later and writes the state at which training stops. No evaluation is added: one that is due at
    this step is made up for when the run resumes.

    Args:
        received: gives the number of the first signal; None: those of this process. Runs that are trained as one look
            at the same number, so that all of them stop at the same step.

    Attributes:
        stopped: number of the signal that ended the run; 0 for none.
    """

    def __init__(self, received: Callable[[], int] | None = None) -> None:
        self.stopped = 0
        self._received = received
        self._step = 0  # optimizer steps at the end of the last batch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on a signal waits for the end of the step."""
        self._step = trainer.global_step
        stop_signals.gently()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on a signal waits for the end of the batch."""
        stop_signals.gently()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops here if it was requested on any rank. Gradients that are still accumulated would be lost."""
        step, before = trainer.global_step, self._step
        self._step = step
        if step != before and self.asked(trainer):
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # else Lightning evaluates once more before it stops

    def asked(self, trainer: pl.Trainer) -> bool:
        """Whether a signal asked any rank to stop. All ranks must call."""
        received = self._received or stop_signals.received
        self.stopped = Fit(trainer).largest(received())
        return bool(self.stopped)
