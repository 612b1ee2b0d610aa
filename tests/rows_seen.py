"""A callback, added by an override, that records the rows that each rank trained on."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ranker.data.batch import Batch
from ranker.training.stability_callback import Stability

OVERRIDE = "+callbacks.rows._target_=rows_seen.RowsSeen"


class RowsSeen(Callback):
    """Writes ``seen_rank<r>.pt`` into the run folder: step, number and rows of each batch; rollbacks; weights."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, list[int]]] = []
        self._step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        completed = trainer.global_step != self._step
        self._step = trainer.global_step
        self.batches.append((self._step + (not completed), batch.number, batch.row_B.tolist()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = next(c for c in trainer.callbacks if isinstance(c, Stability)).rollbacks
        seen = {"batches": self.batches, "rollbacks": done, "weights": pl_module.state_dict()}
        torch.save(seen, f"{trainer.default_root_dir}/seen_rank{trainer.global_rank}.pt")
