"""1x of a log from short runs of naive Adagrad: the smallest learning rate at which most of them are lost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ranker.errors import UserError
from ranker.stability.lr_headroom import Outcome, survival

LEARNS = 0.55  # an AUC that must be reached at some rate; below it there is nothing to lose
TRAINS = 0.9  # of the way from 0.5 to the best AUC, which the rates that survive near a quarter of 1x must go
QUARTER = 4.0  # 1x over the rate at which naive Adagrad should train about as well as it ever does


@dataclass(frozen=True, kw_only=True)
class BaseRate:
    """A proposal for 1x.

    Attributes:
        multiple: 1x, as a multiple of the present one.
        reason: why, in one line.
        doubts: what speaks against it, one line each.
    """

    multiple: float
    reason: str
    doubts: tuple[str, ...]


def base_rate(outcomes: Sequence[Outcome]) -> BaseRate:
    """Proposes 1x from runs of naive Adagrad at several rates and seeds.

    1x is the smallest rate at which most runs are lost (isotonic share of survivors below one half). Where none is,
    it is four times the rate with the best AUC: at a quarter of 1x naive Adagrad trains about as well as it ever does.

    Args:
        outcomes: runs, with rates as multiples of the present 1x.

    Raises:
        UserError: no run tells anything, or every rate loses most runs.
    """
    levels = survival(outcomes)
    if not levels:
        raise UserError("every run failed, so nothing is known; headroom.csv has the reasons")
    lost = [level for level in levels if level.share < 0.5]
    kept = [level for level in levels if level.share >= 0.5]
    if not kept:
        raise UserError(
            f"most runs are lost even at {levels[0].rate:g} of the present 1x: not the rate is the cause but the start "
            "(scale of the features: data.dense_statistics=past_windows, log1p), or lower headroom.lowest"
        )
    aucs = {level.rate: _mean_auc(outcomes, level.rate) for level in kept}
    known = {rate: auc for rate, auc in aucs.items() if math.isfinite(auc)}
    best = max(known, key=lambda rate: known[rate]) if known else None
    doubts = _doubts(lost[0].rate if lost else None, known)
    if lost:
        first = lost[0]
        reason = f"{first.runs - first.survived} of {first.runs} runs are lost there, most survive at {kept[-1].rate:g}"
        return BaseRate(multiple=first.rate, reason=f"{reason} of the present 1x", doubts=doubts)
    if best is None:
        raise UserError("no run is lost and none has an AUC, so no rate is better than another; raise headroom.highest")
    reason = (
        f"no rate up to {levels[-1].rate:g} of the present 1x loses most runs, and a quarter of it has the best AUC"
    )
    return BaseRate(multiple=QUARTER * best, reason=reason, doubts=doubts)


def _doubts(first_lost: float | None, aucs: dict[float, float]) -> tuple[str, ...]:
    if not aucs:
        return ("no task has an AUC, so it is not known whether the runs that survive learn anything",)
    best = max(aucs.values())
    if best < LEARNS:
        return (f"naive Adagrad learns next to nothing at any rate (AUC {best:.3f} at most): there is nothing to lose",)
    if first_lost is None:
        return ("naive Adagrad did not diverge in these short runs; whole runs may (train.max_steps=-1)",)
    below = [rate for rate in aucs if rate <= first_lost / 2]
    near = max(below, default=min(aucs))
    if aucs[near] < 0.5 + TRAINS * (best - 0.5):
        return (f"at {near:g} of the present 1x naive Adagrad reaches {aucs[near]:.3f} only, and {best:.3f} elsewhere",)
    return ()


def _mean_auc(outcomes: Sequence[Outcome], rate: float) -> float:
    aucs = [o.auc for o in outcomes if o.rate == rate and o.survived and math.isfinite(o.auc)]
    return statistics.fmean(aucs) if aucs else math.nan
