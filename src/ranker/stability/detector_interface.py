"""The detector's interface: the signals it is given at each step, and the events it reports."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

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


_PER_TASK, _OTHERS, _CUT = 7, 4, 3  # numbers in a row of signals: per task, beside, and of the step cut among them


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
    """The signals as one float32 row on the device of the losses; nan for missing signals. Several steps: rows.

    In this order: losses, running AUCs, spreads, AUCs of the batch, positives, labels, variances (T numbers each),
    whether not finite (1), the step cut (3).
    """
    losses_T = losses_T.detach().float()
    unknown_T = losses_T.new_full(losses_T.shape, torch.nan)
    steps = losses_T.shape[:-1]
    flag = losses_T.new_zeros(*steps, 1) if nonfinite is None else nonfinite.detach().to(losses_T).reshape(*steps, 1)
    cut_3 = losses_T.new_full((*steps, 3), torch.nan) if step_cut_3 is None else step_cut_3.detach().to(losses_T)
    by_task = (auc_T, spread_T, batch_auc_T, positives_T, labels_T, variance_T)
    rows = [losses_T, *(unknown_T if x is None else x.detach().to(losses_T) for x in by_task), flag, cut_3]
    return torch.cat(rows, dim=-1)


def with_step_cut(row: Tensor, step_cut_3: Tensor) -> Tensor:
    """A row of ``pack`` with another step cut."""
    return torch.cat([row[:-_CUT], step_cut_3.to(row)])


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
