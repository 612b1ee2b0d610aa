"""A callback for tests that start whole runs: writes down which rows each step trained on, and may kill its process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class RowRecorder(Callback):
    """One line a step: the batch's number and its row ids.

    Args:
        folder: where to write, a file a rank.
        kill_at: kill -9 this process once, when a batch of this number begins; None: never.
    """

    def __init__(self, *, folder: str, kill_at: int | None = None) -> None:
        self._folder, self._kill_at = Path(folder), kill_at

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        killed = self._folder / "killed"
        if batch.number == self._kill_at and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self._folder / f"rank{trainer.global_rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([batch.number, batch.row_B.tolist()]) + "\n")
