"""Which checkpoints a run keeps: the newest one."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint


class NewestCheckpoint(ModelCheckpoint):
    """Writes a checkpoint every so many steps and then removes the one before, so that one is whole at any moment.

    Args:
        folder: where they go, named after their step.
        every: steps; 0 writes none.
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

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Has the loggers write what they hold first: a resumed run goes on behind the checkpoint's step."""
        for logger in trainer.loggers:
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    @property
    def state_key(self) -> str:
        """Without the interval, which Lightning would put in: a run may go on with another one."""
        return type(self).__qualname__
