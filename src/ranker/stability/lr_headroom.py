"""Learning-rate headroom: which rates to try, and the estimate of the largest stable rate from the outcomes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Literal

from ranker.errors import UserError

MAX_ENUMERATED_SEEDS = 5  # up to this many seeds all resamples are used: 5^5 = 3,125
RESAMPLES = 2_000  # number of random resamples with more seeds


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a short run.

    Attributes:
        rate: learning rate, in multiples of 1x.
        seed: seed of the run.
        survived: whether the run was stable; None where it failed for another reason.
        auc: AUC of the first binary task on the hold-out at the end; nan where there is none.
        reason: why the run was lost or failed; empty where it survived.
    """

    rate: float
    seed: int
    survived: bool | None
    auc: float = math.nan
    reason: str = ""


@dataclass(frozen=True)
class Search:
    """The search for the largest stable learning rate.

    Attributes:
        lowest: smallest rate to try, in multiples of 1x.
        highest: largest rate to try.
        step: factor between two rates as long as all rates survived, or all were lost.
        tolerance: the search ends when the first lost rate is at most this many times the last stable one.
        points: number of rates tried in parallel inside the bracket; 1 is bisection.

    Raises:
        UserError: a value is out of range.
    """

    lowest: float
    highest: float
    step: float
    tolerance: float
    points: int

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= 1 <= self.highest:
            raise UserError(f"headroom: lowest and highest must enclose 1x, got {self.lowest:g} and {self.highest:g}")
        for name in ("step", "tolerance"):
            if not getattr(self, name) > 1:
                raise UserError(f"headroom: {name} is a factor and must be above 1, got {getattr(self, name):g}")
        if self.points < 1:
            raise UserError(f"headroom: points must be 1 or more, got {self.points}")

    def next_rates(self, outcomes: Sequence[Outcome]) -> list[float]:
        """The rates to try next; empty when the bracket is narrow enough or no new rate is left in the range.

        The search starts with 1x and all rates above it, in factors of ``step``. If 1x is lost it goes down. Then it
        searches between the largest stable rate (isotonic share of at least half, see ``survival``) and the next one.
        If seeds disagree at the smallest or the largest rate tried, it tries one step further out at the end;
        otherwise the interval would be open there.
        """
        tried = {outcome.rate for outcome in outcomes}
        if not tried:
            return self._up_from(1.0)
        levels = survival(outcomes)
        stable = [level.rate for level in levels if level.share >= 0.5]
        lost = [level.rate for level in levels if level.share < 0.5]
        further_down, further_up = min(tried) / self.step, max(tried) * self.step
        if not stable:
            wanted = [further_down]
        elif not lost:
            wanted = [further_up]
        elif lost[0] / stable[-1] <= self.tolerance:
            wanted = [further_down] if levels[0].survived < levels[0].runs else []
            wanted += [further_up] if levels[-1].survived else []
        else:
            ratio = (lost[0] / stable[-1]) ** (1.0 / (self.points + 1))
            wanted = [stable[-1] * ratio**k for k in range(1, self.points + 1)]
        return [rate for rate in map(self._allowed, wanted) if rate not in tried]

    def _up_from(self, rate: float) -> list[float]:
        rates = [rate]
        while rates[-1] < self.highest:
            rates.append(self._allowed(rates[-1] * self.step))
        return rates

    def _allowed(self, rate: float) -> float:
        return min(max(rounded(rate), self.lowest), self.highest)


@dataclass(frozen=True, kw_only=True)
class Level:
    """The runs at one learning rate.

    Attributes:
        rate: learning rate, in multiples of 1x.
        survived: number of runs that survived.
        runs: number of runs that survived or were lost.
        share: probability of survival, by isotonic regression over all rates.
        low: lower end of the Wilson interval of this rate by itself.
        high: upper end of that interval.
    """

    rate: float
    survived: int
    runs: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """The largest stable learning rate, in multiples of 1x.

    Attributes:
        value: the rate at which survival and loss are equally likely. If all runs survive, the largest rate tried; if
            none does, the smallest.
        low: lower end of the interval; 0 where no rate certainly survives.
        high: upper end of the interval; infinite where no rate is certainly lost.
        beyond: ``above`` if the value is only a lower bound, ``below`` if it is only an upper bound, else empty.
        monotone: whether no rate survived more often than a lower one.
    """

    value: float
    low: float
    high: float
    beyond: Literal["above", "below", ""]
    monotone: bool

    def __str__(self) -> str:
        if self.beyond == "above":
            return f">= {self.value:.3g}x"
        if self.beyond == "below":
            return f"< {self.value:.3g}x"
        low = f"{self.low:.3g}x" if self.low else "0"
        high = f"{self.high:.3g}x" if math.isfinite(self.high) else "no end"
        return f"{self.value:.3g}x [{low}, {high}]"


def settled(outcomes: Sequence[Outcome], *, min_auc: float) -> list[Outcome]:
    """The outcomes, where a run whose AUC ended at chance also counts as lost if lower rates learned.

    The divergence detector reports such a run only after a blow-up. A model that a large rate made constant in its
    first steps never had a better AUC that could be compared with. A model that does not learn at lower rates either
    is slow, not lost.

    Args:
        outcomes: runs at several rates and seeds.
        min_auc: smallest AUC of a model that has learned.
    """
    found = []
    for outcome in outcomes:
        below = [o.auc for o in outcomes if o.rate < outcome.rate and o.survived and not math.isnan(o.auc)]
        if outcome.survived and outcome.auc < min_auc and below and median(below) >= min_auc:
            reason = f"AUC {outcome.auc:.3f} on the hold-out, where lower rates learn"
            outcome = Outcome(rate=outcome.rate, seed=outcome.seed, survived=False, auc=outcome.auc, reason=reason)
        found.append(outcome)
    return found


def survival(outcomes: Sequence[Outcome], *, confidence: float = 0.9) -> list[Level]:
    """The survival curve, from the smallest rate to the largest, without rates whose runs all failed."""
    known = [outcome for outcome in outcomes if outcome.survived is not None]
    rates = sorted({outcome.rate for outcome in known})
    counts = [[o.survived for o in known if o.rate == rate] for rate in rates]
    survived, runs = [sum(map(bool, c)) for c in counts], [len(c) for c in counts]
    shares = isotonic([k / n for k, n in zip(survived, runs, strict=True)], runs)
    levels = []
    for rate, k, n, share in zip(rates, survived, runs, shares, strict=True):
        low, high = wilson(k, n, confidence=confidence)
        levels.append(Level(rate=rate, survived=k, runs=n, share=share, low=low, high=high))
    return levels


def headroom(outcomes: Sequence[Outcome], *, confidence: float = 0.9) -> Headroom | None:
    """The largest stable learning rate and its interval; None where all runs failed.

        p(lr)  = decreasing isotonic regression of survived (1, 0) on lr
        value  = the lr with p = 1/2, interpolated between neighbouring rates linearly in log(lr)
        a, c   = the largest rate tried with p >= 1/2, and the next one
        interval = [quantile of a, quantile of c] over resamples of the seeds

    A seed is resampled with all its runs, because runs of one seed share the data order and are correlated. The
    interval uses the ends a and c and not the interpolated value, because the grid only shows that the change is
    between them. With up to 5 seeds all resamples are used, with more seeds 2,000 random ones.

    Args:
        outcomes: runs at several rates and seeds.
        confidence: confidence level of the interval, such as 0.9.

    Source: isotonic regression by pooling adjacent violators, Ayer et al. (1955), An Empirical Distribution Function
        for Sampling with Incomplete Information (it estimates the dose that half of the subjects survive); percentile
        bootstrap over clusters, Davison and Hinkley (1997), sections 2.4 and 3.8.
    """
    levels = survival(outcomes)
    if not levels:
        return None
    value, low, high = _crossing(levels)
    raw = [level.survived / level.runs for level in levels]
    monotone = all(a >= b for a, b in itertools.pairwise(raw))
    lows, highs = [], []
    for drawn in _resamples(outcomes):
        again = survival(drawn)
        if again:
            _, a, c = _crossing(again)
            lows.append(a)
            highs.append(c)
    tail = (1.0 - confidence) / 2.0
    beyond: Literal["above", "below", ""] = "above" if math.isinf(high) else "below" if low == 0 else ""
    return Headroom(
        value=value, low=_quantile(lows, tail), high=_quantile(highs, 1.0 - tail), beyond=beyond, monotone=monotone
    )


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The decreasing sequence that is nearest to the values in weighted squares, by pooling adjacent violators."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        mean, total, length = value, float(weight), 1
        while blocks and blocks[-1][0] < mean:
            before = blocks.pop()
            mean = (before[0] * before[1] + mean * total) / (before[1] + total)
            total, length = before[1] + total, before[2] + length
        blocks.append((mean, total, length))
    return [mean for mean, _, length in blocks for _ in range(length)]


def wilson(survived: int, runs: int, *, confidence: float) -> tuple[float, float]:
    """The Wilson interval of a share.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: Wilson (1927), Probable Inference, the Law of Succession, and Statistical Inference.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    p, n = survived / runs, runs
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def rounded(rate: float) -> float:
    """The rate with three digits: short names of folders, and a repeated search finds the runs of the first one."""
    return float(f"{rate:.3g}")


def _crossing(levels: Sequence[Level]) -> tuple[float, float, float]:
    """Where the curve crosses one half, and the rates tried on both sides; 0 or infinity where there is none."""
    stable = [i for i, level in enumerate(levels) if level.share >= 0.5]
    if not stable:
        return levels[0].rate, 0.0, levels[0].rate
    i = stable[-1]
    if i == len(levels) - 1:
        return levels[i].rate, levels[i].rate, math.inf
    here, there = levels[i], levels[i + 1]
    part = (here.share - 0.5) / (here.share - there.share)
    return here.rate * (there.rate / here.rate) ** part, here.rate, there.rate


def _resamples(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    by_seed: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        by_seed.setdefault(outcome.seed, []).append(outcome)
    seeds = sorted(by_seed)
    if len(seeds) <= MAX_ENUMERATED_SEEDS:
        draws = list(itertools.product(seeds, repeat=len(seeds)))
    else:
        draw = random.Random(0)
        draws = [tuple(draw.choices(seeds, k=len(seeds))) for _ in range(RESAMPLES)]
    return [[outcome for seed in chosen for outcome in by_seed[seed]] for chosen in draws]


def _quantile(values: Sequence[float], q: float) -> float:
    """The smallest value such that at least this share of the values is at or below it."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)]
