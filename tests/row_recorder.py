"""A callback for tests of whole runs: records the rows of each step, and can kill its own process."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class RowRecorder(Callback):
    """Writes one line per step: the batch's number and its row ids.

    Args:
        folder: output folder, one file per rank.
        kill_at: send SIGKILL to this process once, when the batch with this number begins. None: never.
    """

    def __init__(self, *, folder: str, kill_at: int | None = None) -> None:
        self._folder, self._kill_at = Path(folder), kill_at

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch.number == self._kill_at:
            with suppress(FileExistsError):  # of two ranks that come at the same time, only one may make the file
                (self._folder / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        with open(self._folder / f"rank{trainer.global_rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([batch.number, batch.row_B.tolist()]) + "\n")
