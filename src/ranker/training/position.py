"""Keeps count of the batches trained on, so that a checkpoint knows where in the log it stands."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ranker.data.batch import Batch
from ranker.data.datamodule import RankingDataModule


class DataPosition(Callback):
    """Moves the data module's position past each batch.

    A callback, because Lightning writes checkpoints in a callback too, before the module's own hook is called.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Notes the batch."""
        datamodule: RankingDataModule = trainer.datamodule  # type: ignore[attr-defined]
        datamodule.advance(batch)
