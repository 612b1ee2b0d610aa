"""A callback for tests of whole runs: records the rows of each step, and can kill its own process or wait."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ranker import stop_signals


class RowRecorder(Callback):
    """Writes one line per step: the batch's number and its row ids.

    Args:
        folder: output folder, one file per rank.
        kill_at: send SIGKILL to this process once, when the batch with this number begins. None: never.
        hold_at: wait once, when the batch with this number begins, until the file ``go`` is in the folder, or until a
            signal asks one rank to stop. A file ``held0`` says that rank 0 waits. None: never.
    """

    def __init__(self, *, folder: str, kill_at: int | None = None, hold_at: int | None = None) -> None:
        self._folder, self._kill_at, self._hold_at = Path(folder), kill_at, hold_at

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch.number == self._kill_at:
            with suppress(FileExistsError):  # of two ranks that come at the same time, only one may make the file
                (self._folder / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        if batch.number == self._hold_at:
            (self._folder / f"held{trainer.global_rank}").touch()
            while not (self._folder / "go").exists():
                if stop_signals.received():
                    (self._folder / "go").touch()
                time.sleep(0.01)
        with open(self._folder / f"rank{trainer.global_rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([batch.number, batch.row_B.tolist()]) + "\n")
