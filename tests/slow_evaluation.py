"""A callback for tests of whole runs: makes one evaluation slow, and says in a file that it has begun."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class SlowEvaluation(Callback):
    """Waits after the first batch of one kind of evaluation, once.

    Args:
        stage: ``validate`` or ``test``.
        seconds: to wait.
        folder: gets an empty file with the name of the stage when the batch has ended. Where it is, nothing waits.
    """

    def __init__(self, *, stage: str, seconds: float, folder: str) -> None:
        self._stage, self._seconds, self._begun = stage, seconds, Path(folder) / stage

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        self._wait("validate")

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        self._wait("test")

    def _wait(self, stage: str) -> None:
        if stage == self._stage and not self._begun.exists():
            self._begun.touch()
            time.sleep(self._seconds)
