"""The detector's interface: its settings, the signals it is given at each step, and the events it reports."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from ranker.errors import UserError

MAX_PROOF_STEPS = 200  # bounds what is kept of past batches
Kind = Literal["micro", "full", "shift", "unsettled"]
Status = Literal["healthy", "suspect", "diverged"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """A divergence, or a lasting change of a loss.

    Attributes:
        kind: ``micro``: the loss spiked, and the loss and what was learned came back. ``full``: the model is lost.
            ``shift``: one loss moved to a new level and stayed there while the predictions stayed good; this is not a
            divergence (labels can change). ``unsettled``: training ended before it was known which of these it is.
        step: first step of the event.
        task: name of the task whose loss moved first; empty where all tasks moved at once.
        depth: highest ratio of a loss to its baseline, over all tasks; infinite where a loss was not finite.
        length: number of steps from the first step to the recovery, or to the verdict if there was no recovery.
        recovered_at: first step after the recovery; None if the loss did not recover.
        judged_at: step at which the verdict was reached; ``judged_at - step`` is the latency.
        reason: description of the event in one sentence.
    """

    kind: Kind
    step: int
    task: str
    depth: float
    length: int
    recovered_at: int | None
    judged_at: int
    reason: str

    def __str__(self) -> str:
        return self.reason

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; a depth that is not finite becomes None."""
        return asdict(self) | {"depth": self.depth if math.isfinite(self.depth) else None}


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """Settings of ``DivergenceDetector``.

    A loss is high when it exceeds its baseline by more than each of ``jump_ratio``, ``jump_scales`` and ``jump_floor``
    require. Each of them guards against one kind of noise: drift of a quiet loss, heavy tails, and rare positives
    (where positives are one row in a thousand, one more positive multiplies the loss of a batch).

    Attributes:
        window: number of accepted losses that the baseline is the median of.
        jump_ratio: smallest ratio of a high loss to the baseline.
        jump_scales: smallest distance of a high loss from the baseline, in robust standard deviations.
        jump_floor: smallest distance of a high loss from the baseline, as a share of the task's first loss, which is
            the loss of the untrained model.
        outlier_steps: number of steps that a spike of fewer than half of the tasks must last. One outlier row can raise
            a squared error 30 times for one step without harm to the model.
        lone_factor: where there is one task only, a shorter spike must exceed the threshold this many times.
        max_rise: number of steps in which the baseline may at most double; a loss that grows faster is not drift.
        startup: number of first steps in which a spike that recovers is not an event: the first steps of Adagrad are
            noisy.
        settle: number of consecutive steps below the threshold after which a spike is over.
        patience: number of steps that a spike may last; a model takes 10 to 300 steps to recover.
        lost_ratio: after ``patience`` steps, a loss this many times its baseline, for most tasks, means a lost model.
        lost_ratio_alone: the same for a single task.
        blowup_ratio: a spike to this many times a task's first loss is a blow-up. A model that has learned nothing
            after a blow-up is lost; without a blow-up it may be slow.
        nonfinite_patience: number of consecutive steps with a loss or prediction that is not finite.
        dead_spread: standard deviation of logits below which predictions do not depend on the input.
        dead_patience: number of consecutive steps at which all tasks are below ``dead_spread``.
        unborn_patience: the same for a model that was never above it (heads may start at zero, during warm-up).
        auc_tolerance: AUCs that exceed 0.5 by less than this on average are at chance (see ``auc_above_chance``).
        auc_patience: number of consecutive steps with training AUCs at chance, after better AUCs or a blow-up.
        proof_steps: number of batches over which the skill is measured after a spike (``Skill``).
        recovery_steps: number of steps after a spike within which the skill must have come back.
        lost_share: share of an AUC's distance from 0.5 that must be missing for it to count as lost.
        lost_step_cut: cut of the median step size of a layer (``StepCut``) at which a spike has ended learning, if the
            AUC is lost too.
        fast_steps: number of batches from the first step of the spike that this verdict needs.
        min_labels: number of labels that a loss must be the mean of. Batches with fewer are added up.
        lost_ne: smallest normalised entropy on the hold-out (log loss divided by the log loss of always predicting the
            base rate), median over binary tasks, at which a model is lost if its median AUC there is at chance.
    """

    window: int = 128
    jump_ratio: float = 1.5
    jump_scales: float = 12.0
    jump_floor: float = 0.1
    outlier_steps: int = 3
    lone_factor: float = 5.0
    max_rise: int = 500
    startup: int = 50
    settle: int = 10
    patience: int = 400
    lost_ratio: float = 3.0
    lost_ratio_alone: float = 10.0
    blowup_ratio: float = 30.0
    nonfinite_patience: int = 20
    dead_spread: float = 1e-3
    dead_patience: int = 50
    unborn_patience: int = 300
    auc_tolerance: float = 0.02
    auc_patience: int = 200
    proof_steps: int = 50
    recovery_steps: int = 250
    lost_share: float = 0.2
    lost_step_cut: float = 200.0
    fast_steps: int = 8
    min_labels: int = 8
    lost_ne: float = 3.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise UserError(f"divergence detector: {field.name} must be a number above 0, got {value!r}")
        bounds = {"window": 16, "jump_ratio": 1.0, "lost_ratio": self.jump_ratio, "lost_step_cut": 1.0}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise UserError(f"divergence detector: {name} must be at least {least:g}, got {getattr(self, name):g}")
        if self.lost_share > 1:
            raise UserError(f"divergence detector: lost_share must be at most 1, got {self.lost_share:g}")
        if not self.proof_steps <= min(self.recovery_steps, MAX_PROOF_STEPS):
            raise UserError(
                f"divergence detector: proof_steps must be at most recovery_steps and at most {MAX_PROOF_STEPS}, "
                f"got {self.proof_steps} and {self.recovery_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """The signals of one step as numbers; the lists have one number per task. See ``Signals``."""

    losses: list[float]
    aucs: list[float]
    spreads: list[float]
    batch_aucs: list[float]
    positives: list[float]
    labels: list[float]
    variances: list[float]
    nonfinite: bool
    worst_cut: float

    @classmethod
    def of(cls, row: list[float]) -> StepValues:
        """From a row of ``pack``."""
        tasks = num_tasks(len(row))
        losses, aucs, spreads, batch_aucs, positives, labels, variances = (
            row[i * tasks : (i + 1) * tasks] for i in range(_PER_TASK)
        )
        return cls(
            losses=losses,
            aucs=aucs,
            spreads=spreads,
            batch_aucs=batch_aucs,
            positives=positives,
            labels=labels,
            variances=variances,
            nonfinite=row[_PER_TASK * tasks] != 0,
            worst_cut=row[_PER_TASK * tasks + 1],
        )


_PER_TASK, _OTHERS = 7, 4  # numbers in a row of signals: per task, and beside


class Signals(TypedDict):
    """The signals of one step, as keyword arguments of ``DivergenceDetector.update``; None where one is missing.

    losses_T: unweighted loss per task over all ranks; exactly 0 where no label was observed.
    auc_T: running training AUC per task; nan for regressions.
    spread_T: standard deviation of the logits over the batch, per task.
    nonfinite: scalar, true where any prediction is nan or infinite.
    batch_auc_T: AUC of this batch alone, per task; nan for regressions and where one of the labels is missing.
    positives_T, labels_T: number of positive and of observed labels in the batch, per task.
    variance_T: variance of the observed labels in the batch, per task.
    step_cut_3: what ``StepCut.update`` returns.
    """

    losses_T: Tensor
    auc_T: Tensor | None
    spread_T: Tensor | None
    nonfinite: Tensor | None
    batch_auc_T: Tensor | None
    positives_T: Tensor | None
    labels_T: Tensor | None
    variance_T: Tensor | None
    step_cut_3: Tensor | None


def reduce_signals(
    losses_T: Tensor,
    auc_T: Tensor | None = None,
    spread_T: Tensor | None = None,
    nonfinite: Tensor | None = None,
    *,
    batch_auc_T: Tensor | None = None,
    positives_T: Tensor | None = None,
    labels_T: Tensor | None = None,
    variance_T: Tensor | None = None,
    step_cut_3: Tensor | None = None,
) -> Signals:
    """Reduces the signals of one step over the ranks, so that all ranks reach the same verdict at the same step.

    All become their mean over the ranks, but for the spread, which becomes the root of the mean variance, and
    ``nonfinite``, which is true where it is true on any rank. One all-reduce of a row of ``pack``; without
    ``torch.distributed`` the signals pass unchanged. All ranks must call this function, with the same signals present.
    AUC, counts and variance of the batch must be those of all ranks' rows already, as from ``StreamingAUC.stats``.

    Returns:
        Keyword arguments of ``DivergenceDetector.update``.
    """
    given: Signals = {
        "losses_T": losses_T,
        "auc_T": auc_T,
        "spread_T": spread_T,
        "nonfinite": nonfinite,
        "batch_auc_T": batch_auc_T,
        "positives_T": positives_T,
        "labels_T": labels_T,
        "variance_T": variance_T,
        "step_cut_3": step_cut_3,
    }
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return given
    squared = given.copy()
    squared["spread_T"] = spread_T.square() if spread_T is not None else None
    row = pack(**squared)
    dist.all_reduce(row)
    mean = unpack(row / dist.get_world_size())
    reduced: dict[str, Any] = {name: mean[name] if value is not None else None for name, value in given.items()}  # type: ignore[literal-required]
    if spread_T is not None:
        reduced["spread_T"] = reduced["spread_T"].sqrt()
    if nonfinite is not None:
        reduced["nonfinite"] = reduced["nonfinite"] > 0
    return reduced  # type: ignore[return-value]


def row_width(tasks: int) -> int:
    """How many numbers a row of ``pack`` has."""
    return _PER_TASK * tasks + _OTHERS


def num_tasks(width: int) -> int:
    """Of how many tasks a row of this many numbers is."""
    return (width - _OTHERS) // _PER_TASK


def pack(
    losses_T: Tensor,
    auc_T: Tensor | None = None,
    spread_T: Tensor | None = None,
    nonfinite: Tensor | None = None,
    batch_auc_T: Tensor | None = None,
    positives_T: Tensor | None = None,
    labels_T: Tensor | None = None,
    variance_T: Tensor | None = None,
    step_cut_3: Tensor | None = None,
) -> Tensor:
    """The signals as one float32 row on the device of the losses; nan for missing signals.

    In this order: losses, running AUCs, spreads, AUCs of the batch, positives, labels, variances (T numbers each),
    whether not finite (1), the step cut (3).
    """
    losses_T = losses_T.detach().float()
    unknown_T = losses_T.new_full(losses_T.shape, torch.nan)
    flag = losses_T.new_zeros(1) if nonfinite is None else nonfinite.detach().to(losses_T).reshape(1)
    cut_3 = losses_T.new_full((3,), torch.nan) if step_cut_3 is None else step_cut_3.detach().to(losses_T)
    by_task = (auc_T, spread_T, batch_auc_T, positives_T, labels_T, variance_T)
    return torch.cat([losses_T, *(unknown_T if x is None else x.detach().to(losses_T) for x in by_task), flag, cut_3])


def unpack(row: Tensor) -> Signals:
    """The signals of a row, or of several: the last dimension is that of ``pack``. Missing signals are nan."""
    tasks = num_tasks(row.shape[-1])
    *by_task, flag, cut = row.split([tasks] * _PER_TASK + [1, 3], dim=-1)
    losses, auc, spread, batch_auc, positives, labels, variance = by_task
    return {
        "losses_T": losses,
        "auc_T": auc,
        "spread_T": spread,
        "nonfinite": flag[..., 0],
        "batch_auc_T": batch_auc,
        "positives_T": positives,
        "labels_T": labels,
        "variance_T": variance,
        "step_cut_3": cut,
    }
