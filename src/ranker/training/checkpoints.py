"""Checkpoints of a run: the two newest, the newest healthy and the best. Each is on the disk before it has its name."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from torch.optim import Optimizer

from ranker.atomic import replacing
from ranker.errors import UserError
from ranker.runs import objective
from ranker.runs.checkpoint_files import BEST, Best, by_step, path_of, step_of
from ranker.runs.table_files import COPIES
from ranker.stop_signals import Stopped
from ranker.training.fit import Fit
from ranker.training.interruption import Interruption
from ranker.training.table_checkpoints import DurableCheckpointIO

KEPT = 2


class Checkpoints(Checkpoint):
    """Writes a checkpoint at an interval, at the last step and where the hold-out was best.

    Keeps the two newest, the newest healthy one and the best. All but the best are written when a batch has ended, so a
    run resumes from each of them in the same way: also a finished run, with more steps. Lightning moves this callback
    behind all others, whose state belongs into the file.

    Args:
        folder: where they go, named after their step.
        every: steps between two checkpoints; 0 writes one only when the run is interrupted.
        windows: also write one at the end of each window.
        best_by: metric of the hold-out, such as ``test/click/auc``, that decides which is the best; None keeps none.
        interruption: says whether the run ends because of a request.
        healthy: says whether the divergence detector objects to nothing. The newest checkpoint of a healthy step is
            kept too, so that a run that is lost has one to go back to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        windows: bool = False,
        best_by: str | None = None,
        interruption: Interruption | None = None,
        healthy: Callable[[], bool] = lambda: True,
    ) -> None:
        self._folder, self._every, self._interruption, self._healthy = folder, every, interruption, healthy
        self._windows = windows
        self._best_by = objective.while_training(best_by) if best_by else None
        self.best: Best | None = None
        self._ended = 0  # optimizer steps at the end of the last batch
        self._written = 0  # step of the newest checkpoint
        self._sound: Path | None = None  # the newest checkpoint of a healthy step
        self._loops: dict[str, Any] | None = None  # Lightning's progress at the end of the last batch before a pause
        self._leaving = False  # an evaluation ends on request

    def continue_from(self, step: int) -> None:
        """Takes over the files of an interrupted run, up to the step that it resumes from."""
        self._written = self._ended = step
        older = [path for path in by_step(self._folder) if step_of(path) <= step][:-KEPT]
        self._sound = older[-1] if older else None  # a third one is kept for this reason alone
        best = Best.read(self._folder)
        if best is not None and best.step <= step and best.metric == self._best_by:
            self.best = best

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes what a killed process left: half-written files, and checkpoints of steps that will come again."""
        if trainer.is_global_zero:
            for folder in (self._folder, self._folder / BEST, self._folder / COPIES):
                for path in folder.glob(".*.tmp"):
                    path.unlink(missing_ok=True)
            for path in (*by_step(self._folder), *by_step(self._folder / BEST)):
                if step_of(path) > self._written:
                    path.unlink(missing_ok=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to follow the rows of very large tables."""
        if trainer.is_global_zero and self._every and (writer := _writer(trainer)):
            writer.watch(Fit(trainer).module.net, trainer.optimizers[0], self._folder)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Marks the rows of very large tables that the step moves. A hook of torch's optimizer would come too early."""
        if trainer.is_global_zero and (writer := _writer(trainer)):
            writer.before_step()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the checkpoint of a step, if one is due."""
        fit = Fit(trainer)
        step, before = fit.step, self._ended
        self._ended = step
        if step == before:  # a batch whose gradients are accumulated for a later step
            return
        if writer := _writer(trainer):
            writer.after_step(trainer.optimizers[0], step)
        last = trainer.should_stop or step == trainer.max_steps or fit.data.position >= fit.data.num_batches
        asked = self._interruption is not None and self._interruption.stopped
        ended = self._windows and fit.data.at_window_end
        if asked or ended or (self._every and (last or step % self._every == 0)):
            self._write(trainer, step)
        elif last or fit.data.position % (trainer.val_check_batch or math.inf) == 0:  # an evaluation follows
            self._loops = copy.deepcopy(trainer.fit_loop.state_dict())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the last checkpoint of a run that ended in another way, such as a callback that stops it."""
        if self._every and trainer.global_step > self._written:
            self._write(trainer, trainer.global_step)
        self._settle(trainer)
        self._prune(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Waits for a file that is being written, also when the run fails. The first failure is the one to show."""
        with suppress(UserError):
            self._settle(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        """Ends the evaluation if a signal asks for it."""
        self._leave(trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        """Ends the evaluation if a signal asks for it."""
        self._leave(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the evaluation out of a checkpoint that is written in the middle of one: it will be made anew."""
        if self._leaving and self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the checkpoint of this step if the hold-out was never better."""
        if not (self._every and self._best_by):
            return
        fit = Fit(trainer)
        step = fit.step if fit.module.holdout_step is None else fit.module.holdout_step
        value = fit.module.holdout.get(self._best_by, math.nan)
        known = self.best
        if not math.isfinite(value) or (known and not objective.better(value, known.value, self._best_by)):
            return
        self.best = Best(self._best_by, step, value)
        target = self.best.path(self._folder)
        self._settle(trainer)
        if step == self._written:
            if trainer.is_global_zero:
                _link(path_of(self._folder, step), target)
        else:
            trainer.save_checkpoint(target)
            self._settle(trainer)
        if trainer.is_global_zero:
            self.best.write(self._folder)

    def _leave(self, trainer: pl.Trainer) -> None:
        """Ends an evaluation on request, after the state that it evaluates is in a checkpoint.

        Raises:
            Stopped: a signal asked any rank to stop.
        """
        if self._interruption is None or not self._interruption.asked(trainer):
            return
        self._leaving = True
        if trainer.global_step > self._written:
            self._write(trainer, trainer.global_step)
        self._settle(trainer)
        raise Stopped

    def _write(self, trainer: pl.Trainer, step: int) -> None:
        self._settle(trainer)
        trainer.save_checkpoint(path_of(self._folder, step))
        self._written = step
        if self._healthy():
            self._sound = path_of(self._folder, step)
        self._prune(trainer)

    def _settle(self, trainer: pl.Trainer) -> None:
        """Waits until the last checkpoint is on the disk, which with very large tables a thread writes.

        Raises:
            UserError: it cannot be written.
        """
        if trainer.is_global_zero and (writer := _writer(trainer)):
            writer.settle()

    def _prune(self, trainer: pl.Trainer) -> None:
        """Removes all but the newest checkpoints; one that a thread is writing does not count yet."""
        if not trainer.is_global_zero:
            return
        for path in by_step(self._folder)[:-KEPT]:
            if path != self._sound:
                path.unlink(missing_ok=True)
        if writer := _writer(trainer):
            writer.prune([*by_step(self._folder), *by_step(self._folder / BEST)])


def _writer(trainer: pl.Trainer) -> DurableCheckpointIO | None:
    """What writes the files; None where a user's own does."""
    writer = trainer.strategy.checkpoint_io
    return writer if isinstance(writer, DurableCheckpointIO) else None


def _link(source: Path, target: Path) -> None:
    """A second name of a file, or a copy where the file system has no links."""
    target.parent.mkdir(exist_ok=True)
    with replacing(target, durable=True) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            temporary.write_bytes(source.read_bytes())
