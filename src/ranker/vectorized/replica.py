"""One job of a group: all parts of a run of its own, whose forward pass and step the group makes for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer

from ranker import stop_signals
from ranker.build import Run, Shared, build
from ranker.data.batch import Batch
from ranker.data.datamodule import RankingDataModule
from ranker.data.log import Log
from ranker.models import Ranker
from ranker.run import begin_files, finish, verdict, wants_evaluation, why
from ranker.runs.metric_names import VAL
from ranker.runs.run_folder import RunFolder
from ranker.starting_point import continue_files
from ranker.training import trackers
from ranker.training.early_signs_callback import EarlySigns
from ranker.training.lean_loop import LeanEpochLoop
from ranker.training.lightning_private import begin_fit
from ranker.training.module import RankingModule
from ranker.training.training_step import Seen


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    Attributes:
        number: its number in the sweep.
        cfg: its resolved configuration.
        folder: its run folder.
        checkpoint: where it goes on; None: at its beginning.
    """

    number: int
    cfg: DictConfig
    folder: Path
    checkpoint: Path | None = None


class Replica:
    """A run with its module, callbacks, loggers and trainer, of which the group makes forward pass, loss and step.

    Everything around the step is the code of a run alone: callbacks are called in its order, so verdicts, events,
    metrics, checkpoints and capsules are those of a run alone.

    Args:
        job: the job.
        log: the log of the group.
        data: the data module of this replica, or of all.
        received: gives the number of the signal that ends the group; 0 for none.

    Attributes:
        job: as given.
        run: the parts of the run.

    Raises:
        UserError: something in the configuration cannot be built, or the checkpoint does not fit it.
    """

    def __init__(self, job: Job, log: Log, data: RankingDataModule, received: Callable[[], int]) -> None:
        def say(line: str, *, note: str | None = None) -> None:  # noqa: ARG001
            print(f"job {job.number}: {line}", flush=True)

        self.job = job
        shared = Shared(log, data, say, received)
        self.run: Run = build(job.cfg, RunFolder(job.folder), job.checkpoint, shared=shared)
        stability = self.run.stability
        if stability.capsules:
            stability.capsules.grouped = True
        elif stability.snapshots and not job.cfg.callbacks.snapshots.disk:
            stability.snapshots = None  # without capsules nobody reads them, and each is a copy of the model
        self._signs = next((x for x in self.run.trainer.callbacks if isinstance(x, EarlySigns)), None)  # type: ignore[attr-defined]

    @property
    def module(self) -> RankingModule:
        """Model, metrics and settings."""
        return self.run.module

    @property
    def net(self) -> Ranker:
        """The model."""
        return cast(Ranker, self.module.net)

    @property
    def optimizer(self) -> Optimizer:
        """The replica's own optimizer, which has its state and learning rate. It does not step. After ``begin``."""
        return self.run.trainer.optimizers[0]

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self.run.trainer.global_step

    @property
    def lost(self) -> bool:
        """Whether the detector's verdict ends this replica's training."""
        watch, detector = self.run.stability.divergence, self.run.stability.detector
        return watch is not None and watch.stop and detector is not None and detector.status == "diverged"

    @property
    def wants_evaluation(self) -> bool:
        """Whether the evaluation of the step at which the replica goes on is missing."""
        return wants_evaluation(self.run)

    def begin(self, log: Log) -> None:
        """Writes the first files, and makes optimizer, schedule and detector, in the state of the checkpoint."""
        begin_files(self.run, log)
        continue_files(self.run)
        begin_fit(self.run.trainer, self.module, self.run.datamodule, self.job.checkpoint)
        self._loop.look_up_hooks()
        # Without gradients nothing moves. A schedule warns if it is stepped before its optimizer ever was.
        self.optimizer.step()

    def before_step(self, batch: Batch) -> None:
        """What a run does before the forward pass, such as scoring a window on its first batch."""
        self._loop.begin(batch, last=batch.number + 1 == self.run.datamodule.num_batches)

    def before_backward(self, batch: Batch, total: Tensor) -> None:
        """Early signs look at a forward pass and its graph; where they are due, the replica makes one of its own."""
        if self._signs is not None and self._signs.due:
            self.net(batch)
        self._loop.call("on_before_backward", total)

    def before_optimizer_step(self) -> None:
        """What a run does with its gradients."""
        self._loop.call("on_before_optimizer_step", self.optimizer)

    def after_step(self, batch: Batch, logits_BT: Tensor, losses_T: Tensor, total: Tensor) -> None:
        """Records the step, asks the detector, and writes what is due."""
        self.module.see(Seen(logits_BT=logits_BT, labels_BT=batch.labels_BT, mask_BT=batch.mask_BT, losses_T=losses_T))
        self._loop.end_of_step_elsewhere(batch, total)

    def end_of_training(self) -> None:
        """Reads the verdict on the last steps, as a run does before its hold-out is evaluated."""
        self._call("on_train_end")

    def end_of_evaluation(self, phase: str) -> None:
        """Takes the metrics of the rows that were added since the last evaluation; may keep the best checkpoint."""
        self.module.end_holdout(phase)
        if phase == VAL:
            self._call("on_validation_end")

    def finish(self, seconds: float, more: Mapping[str, Any]) -> dict[str, Any]:
        """Reaches the final verdict after the hold-out was evaluated, and writes the summary.

        Args:
            seconds: since the group began.
            more: what says that this run was trained in a group.
        """
        with trackers.finishing(self.run.loggers):
            status, reason = verdict(self.run)
            return finish(self.run, status, reason, seconds, more)

    def interrupted(self, seconds: float) -> None:
        """Leaves a checkpoint of the last step, where there are any, and the summary of an interrupted run."""
        self.end_of_training()
        with trackers.finishing(self.run.loggers):
            finish(self.run, "failed", why(stop_signals.Stopped(), self.run), seconds)

    @property
    def _loop(self) -> LeanEpochLoop:
        return cast(LeanEpochLoop, self.run.trainer.fit_loop.epoch_loop)

    def _call(self, hook: str) -> None:
        """Calls a hook of all callbacks."""
        for callback in self.run.trainer.callbacks:  # type: ignore[attr-defined]
            getattr(callback, hook)(self.run.trainer, self.module)


@torch.no_grad()
def evaluate(replicas: Sequence[Replica], batches: Iterable[Batch], *, phase: str) -> None:
    """Evaluates replicas on the same rows, which are read once. Each runs its own net, as alone.

    Args:
        replicas: the replicas.
        batches: of the hold-out.
        phase: ``val`` or ``test``.
    """
    if not replicas:
        return
    for replica in replicas:
        replica.net.eval()
    for batch in batches:
        for replica in replicas:
            replica.module.holdout_metrics.add(replica.net(batch), batch)
    for replica in replicas:
        replica.net.train()
        replica.end_of_evaluation(phase)
