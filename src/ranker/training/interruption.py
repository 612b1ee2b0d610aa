"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, stop. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ranker.runs.run_folder import RunFolder


class Interruption(Callback):
    """Ends training between two steps when the process is asked to stop.

    An exception thrown wherever the program happens to be could leave weights half updated; resuming from those would
    not give the run that was interrupted. All ranks stop at the same step, since they agree on the request first.

    Args:
        folder: where the checkpoint goes.

    Attributes:
        stopped: whether training ended because of a request.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.stopped = False
        self._folder = folder
        self._requested = False
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes over the two signals while training; only the main thread may."""
        if stage == "fit" and threading.current_thread() is threading.main_thread() and not self._before:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops here when asked to."""
        if not self._agreed(pl_module.device, trainer.world_size):
            return
        self.stopped = True
        trainer.save_checkpoint(self._folder.checkpoints / f"step={trainer.global_step}.ckpt")
        trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def _agreed(self, device: torch.device, world_size: int) -> bool:
        if world_size == 1:
            return self._requested
        asked = torch.tensor(float(self._requested), device=device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)
