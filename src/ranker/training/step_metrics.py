"""Writes the numbers of each step before a checkpoint of that step can be written."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ranker.data.batch import Batch
from ranker.training.module import RankingModule


class StepMetrics(Callback):
    """Has the module write its step's losses, AUCs and learning rate.

    A callback, because Lightning calls the module's own hook after the checkpoint is written: a process killed in
    between would resume behind a step whose row nobody has.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Writes the step."""
        assert isinstance(pl_module, RankingModule)
        pl_module.record_step()
