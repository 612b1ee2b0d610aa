"""A running fit, as callbacks see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytorch_lightning as pl
import torch

from ranker.data.datamodule import RankingDataModule

if TYPE_CHECKING:
    from ranker.training.module import RankingModule


@dataclass(frozen=True)
class Fit:
    """A running fit, for callbacks: Lightning's trainer, with the module and the data module in their own types.

    Attributes:
        trainer: Lightning's trainer.
    """

    trainer: pl.Trainer

    @property
    def module(self) -> RankingModule:
        """The module that is trained. A fit of this project has no other kind."""
        return cast("RankingModule", self.trainer.lightning_module)

    @property
    def data(self) -> RankingDataModule:
        """The data module."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.trainer.global_step

    def largest(self, value: int) -> int:
        """The largest value over all ranks, which must all call."""
        if self.trainer.world_size == 1:
            return value
        shared = torch.tensor(value, device=self.module.device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return int(shared)
