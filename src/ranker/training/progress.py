"""Progress of a run: a Rich bar on a terminal, a line at intervals in a log file; and messages that do not tear it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ranker.training.fit import Fit

log = logging.getLogger(__name__)


class Say(Protocol):
    """Shows the user a message during training, on the first rank."""

    def __call__(self, line: str, *, note: str | None = None) -> None:
        """Shows a line; a note stays in the progress bar until the next one."""
        ...


@rank_zero_only
def say_in_log(line: str, *, note: str | None = None) -> None:  # noqa: ARG001
    """``Say`` of a run without a progress bar."""
    log.warning(line)


class TrainingProgress(Callback):
    """Shows step, loss, AUC of the first binary task, learning rate and examples per second.

    Args:
        refresh_every: steps between two refreshes; each reads the loss from the device.
        line_seconds: seconds between two lines if the output is not a terminal.
        speed: gives the examples per second.
    """

    def __init__(
        self, *, refresh_every: int = 10, line_seconds: float = 15.0, speed: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._refresh_every = refresh_every
        self._line_seconds = line_seconds
        self._speed = speed
        self._last_line = 0.0
        self._progress: Progress | None = None
        self._console = Console()
        self._note = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar."""
        if not trainer.is_global_zero:
            return
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=12),  # leaves room for the numbers on a terminal of 80 columns
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            total = planned_steps(Fit(trainer))
            self._bar = self._progress.add_task("", total=total, numbers="", completed=trainer.global_step)
            self._progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refreshes the bar, or prints a line."""
        step = trainer.global_step
        if not trainer.is_global_zero or step % self._refresh_every:
            return
        if self._progress is not None:
            fit = Fit(trainer)
            self._progress.update(self._bar, completed=step, total=planned_steps(fit), numbers=self._numbers(fit))
        elif time.monotonic() - self._last_line > self._line_seconds:
            self._last_line = time.monotonic()
            fit = Fit(trainer)
            self._console.print(f"step {step} of {planned_steps(fit)}  {self._numbers(fit)}", soft_wrap=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error starts on a new line."""
        self._close()

    @rank_zero_only
    def say(self, line: str, *, note: str | None = None) -> None:
        """Prints a line above the bar."""
        self._note = note or self._note
        self._console.print(line, style="yellow", highlight=False, soft_wrap=True)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _numbers(self, fit: Fit) -> str:
        module, signals = fit.module, fit.module.signals
        assert signals is not None
        binary = next((i for i, t in enumerate(module.schema.tasks) if t.type == "binary"), None)
        auc = "" if binary is None else f"  {module.schema.tasks[binary].name} AUC {float(signals.auc_T[binary]):.3f}"
        lr = fit.trainer.optimizers[0].param_groups[0]["lr"]
        loss = float((signals.losses_T * module.loss.weight_T).sum())  # train/loss of metrics.csv
        note = f"  {self._note}" if self._note else ""
        speed = f"  {measured:,.0f} examples/s" if (measured := self._speed()) else ""
        return f"loss {loss:.4g}{auc}  lr {float(lr):.3g}{speed}{note}"


def planned_steps(fit: Fit) -> int:
    """Optimizer steps that the run will have taken at its end: a rollback repeats some and leaves out others."""
    left = fit.data.num_batches - fit.data.position
    steps = fit.step + -(-left // fit.trainer.accumulate_grad_batches)
    return min(steps, fit.trainer.max_steps) if fit.trainer.max_steps > 0 else steps
