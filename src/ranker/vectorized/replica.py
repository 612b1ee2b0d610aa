"""One job of a group: what it records, its detector, its evaluations and its summary, as if it ran alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer

from ranker import run_summary
from ranker.build import build_module
from ranker.data.batch import Batch
from ranker.data.log import Log
from ranker.errors import UserError
from ranker.models import Ranker
from ranker.runs import log_identity
from ranker.runs import metric_names as names
from ranker.runs.run_folder import METRICS, RunFolder
from ranker.stability import DivergenceDetector, Event
from ranker.stability.detector_interface import Signals
from ranker.training.metric_rows import over_time, step_values
from ranker.training.metrics_csv import MetricsCsv
from ranker.training.module import KEPT_SIGNALS
from ranker.training.row_thinning import Thinning
from ranker.training.stability_callback import DivergenceWatch, step_cut_values


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    Attributes:
        number: its number in the sweep.
        cfg: its resolved configuration.
        folder: its run folder.
    """

    number: int
    cfg: DictConfig
    folder: Path


class Replica:
    """The parts of one job that a group does not share.

    Args:
        job: the job.
        log: the log of the group.

    Attributes:
        job: as given.
        folder: the run folder.
        module: model, metrics and settings, as of a run alone; no trainer is attached.
        lost: whether the detector's verdict ends this replica's training.

    Raises:
        UserError: something in the configuration cannot be built.
    """

    def __init__(self, job: Job, log: Log) -> None:
        self.job, self.folder = job, RunFolder(job.folder)
        pl.seed_everything(job.cfg.seed, verbose=False)
        self.module = build_module(job.cfg, log.schema)
        try:
            self.own_optimizer: Optimizer = self.module.make_optimizer()
        except (TypeError, ValueError) as error:
            raise UserError(f"optim: {error}") from error
        node = job.cfg.callbacks.get("divergence")
        self._watch: DivergenceWatch | None = None if node is None else instantiate(node, _convert_="all")
        self.detector: DivergenceDetector | None = None
        self._csv = _metrics_csv(job.cfg.logger, self.folder)
        # Of the last steps that are not in metrics.csv: an event has its point in every curve.
        self._recent: deque[tuple[int, Tensor, Tensor, float]] = deque(maxlen=KEPT_SIGNALS)
        self.lost = False

    @property
    def net(self) -> Ranker:
        """The model."""
        return cast(Ranker, self.module.net)

    def begin(self, log: Log, optimizer: Optimizer) -> None:
        """Writes the configuration, and makes the detector.

        Args:
            log: the log.
            optimizer: the one that steps this replica.
        """
        self.folder.save_config(self.job.cfg)
        log_identity.write(self.folder.path, log)
        if self._watch:
            self.detector = self._watch.make(self.module, optimizer)

    def before_step(self, batch: Batch, step: int) -> None:
        """Scores a window on its first batch, before any of its rows is trained on, as a run alone does.

        Args:
            batch: of this replica; it opens a window only with ``train.progressive``.
            step: steps taken.
        """
        if batch.opening is None:
            return
        module = self.module
        module.score(batch.opening, module.progressive_metrics)
        values = module.progressive_metrics.compute()
        module.progressive_metrics.reset()
        self._record(over_time(names.PROGRESSIVE, values) | {names.WINDOW: float(batch.window)}, step)

    def after_step(self, step: int, signals: Signals, lr: float) -> None:
        """Records a step and asks the detector, in the order of a run alone.

        Args:
            step: steps taken.
            signals: of this replica.
            lr: learning rate of the next step.
        """
        due = step % self.module.log_every == 0
        if self._csv:
            auc_T = signals["auc_T"]
            assert auc_T is not None
            self._recent.append((step, signals["losses_T"], auc_T, lr))
            if due:
                self._record_step(*self._recent.pop())
        if not (self._watch and self.detector):
            return
        self.detector.update(step, **signals)
        if self._csv and due and self.detector.step_cut:
            for values in step_cut_values(self.detector.step_cut):
                self._record(values, step)
        if step % self._watch.poll_every == 0:
            self.report(self.detector.poll(), step)
            self.lost = self._watch.stop and self.detector.status == "diverged"

    def report(self, events: Iterable[Event], step: int) -> None:
        """Writes events to events.jsonl and metrics.csv."""
        for event in events:
            self.folder.append_event(event.to_dict())
            self._record({names.divergence(event.kind): float(event.step)}, step)
            for numbers in self._recent:
                if numbers[0] == event.step:
                    self._record_step(*numbers)

    def finish(self, *, optimizer: Optimizer, step: int, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Reaches the final verdict after the hold-out was evaluated, and writes the summary.

        Args:
            optimizer: has the accumulators.
            step: steps taken.
            measured: as in ``summary_of``, and what says that this run was trained in a group.
        """
        if self.detector:
            holdout, tasks = self.module.holdout, self.module.schema.tasks
            aucs, nes = (
                [holdout.get(names.task_metric(names.TEST, task.name, metric), math.nan) for task in tasks]
                for metric in ("auc", "ne")
            )
            self.report(self.detector.finish(eval_auc_T=aucs, eval_ne_T=nes), step)
        status, reason = run_summary.verdict(self.detector)
        summary = run_summary.summary_of(
            self.job.cfg,
            module=self.module,
            detector=self.detector,
            optimizer=optimizer,
            measured=measured,
            status=status,
            reason=reason,
        )
        if self._csv:
            self._csv.finalize("success")
        self.folder.save_summary(summary)
        return summary

    def end_of_training(self, step: int) -> None:
        """Reads the verdict on the last steps, as a run does before its hold-out is evaluated."""
        if self.detector:
            self.report(self.detector.poll(), step)

    def end_of_evaluation(self, phase: str, step: int) -> None:
        """Takes the metrics of the rows that were added since the last evaluation."""
        module = self.module
        values = module.holdout_metrics.compute(final=phase == names.TEST)
        module.holdout_notes, module.holdout_tables = module.holdout_metrics.notes, module.holdout_metrics.tables
        module.holdout_intervals = {f"{phase}/{name}": ends for name, ends in module.holdout_metrics.intervals.items()}
        module.holdout_metrics.reset()
        module.holdout = {f"{phase}/{name}": value for name, value in values.items()}
        self._record(over_time(phase, values), step)

    def _record_step(self, step: int, losses_T: Tensor, auc_T: Tensor, lr: float) -> None:
        self._record(step_values(self.module.schema, losses_T.tolist(), auc_T.tolist(), lr), step)

    def _record(self, values: Mapping[str, float], step: int) -> None:
        if self._csv:
            self._csv.log_metrics(values, step)


def _metrics_csv(settings: DictConfig, folder: RunFolder) -> MetricsCsv | None:
    """The file of a run alone; no other logger is in a group."""
    node = next((node for node in settings.values() if node), None)
    if node is None:
        return None
    options = {name: value for name, value in node.items() if not str(name).startswith("_")}
    return MetricsCsv(folder.path / METRICS, Thinning(**options))


@torch.no_grad()
def evaluate(replicas: Sequence[Replica], batches: Iterable[Batch], *, phase: str, step: int) -> None:
    """Evaluates replicas on the same rows, which are read once. Each runs its own net, as alone.

    Args:
        replicas: the replicas.
        batches: of the hold-out.
        phase: ``val`` or ``test``.
        step: steps taken.
    """
    for replica in replicas:
        replica.net.eval()
    for batch in batches:
        for replica in replicas:
            replica.module.holdout_metrics.add(replica.net(batch), batch)
    for replica in replicas:
        replica.net.train()
        replica.end_of_evaluation(phase, step)
