"""Progress a person can read: a Rich bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ranker.training.module import RankingModule
from ranker.training.throughput import Throughput


class TrainingProgress(Callback):
    """Shows step, loss, AUC of the first binary task, learning rate and examples a second.

    Args:
        refresh_every: steps between two refreshes; each reads the loss from the device.
        line_seconds: seconds between two lines where the output is no terminal.
    """

    def __init__(self, *, refresh_every: int = 10, line_seconds: float = 15.0) -> None:
        self._refresh_every = refresh_every
        self._line_seconds = line_seconds
        self._last_line = 0.0
        self._progress: Progress | None = None
        self._console = Console()
        self.note = ""  # said by other callbacks, such as the divergence watch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar."""
        if not trainer.is_global_zero:
            return
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=12),  # the numbers matter more, and a terminal may have 80 columns
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            total = self._total(trainer)
            self._bar = self._progress.add_task("", total=total, numbers="", completed=trainer.global_step)
            self._progress.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Refreshes the bar, or prints a line."""
        step = trainer.global_step
        if not trainer.is_global_zero or step % self._refresh_every:
            return
        assert isinstance(pl_module, RankingModule)
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, numbers=self._numbers(trainer, pl_module))
        elif time.monotonic() - self._last_line > self._line_seconds:
            self._last_line = time.monotonic()
            total = self._total(trainer)
            self._console.print(
                f"step {step}{f' of {total}' if total else ''}  {self._numbers(trainer, pl_module)}", soft_wrap=True
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error stands on a line of its own."""
        self._close()

    def say(self, line: str) -> None:
        """Prints a line above the bar, where it does not tear it."""
        self._console.print(line, style="yellow", highlight=False, soft_wrap=True)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _numbers(self, trainer: pl.Trainer, module: RankingModule) -> str:
        signals = module.signals
        assert signals is not None
        binary = next((i for i, t in enumerate(module.schema.tasks) if t.type == "binary"), None)
        auc = "" if binary is None else f"  {module.schema.tasks[binary].name} AUC {float(signals.auc_T[binary]):.3f}"
        speed = next((c.examples_per_second for c in trainer.callbacks if isinstance(c, Throughput)), 0.0)  # type: ignore[attr-defined]
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        loss = float(signals.losses_T.sum())
        return f"loss {loss:.4g}{auc}  lr {float(lr):.3g}  {speed:,.0f} examples/s{self.note and '  ' + self.note}"

    def _total(self, trainer: pl.Trainer) -> int | None:
        batches = trainer.datamodule.num_batches  # type: ignore[attr-defined]
        limits = [n for n in (trainer.max_steps, batches) if n and n > 0]
        return min(limits) if limits else None
