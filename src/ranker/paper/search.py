"""The search of table 2: the same number of (G_0, learning rate, threshold) combinations for every method.

Two stages, both on the day before the test day and with one seed. The first takes points of a low-discrepancy sequence
(Halton 1960), the same for every method. The second tries the neighbours of the best point of the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from ranker.paper.jobs import FOLLOWED, THRESHOLDS, Job, Setting, grid

G_KEY = "optim.initial_accumulator_value"
G_0 = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
RATES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # multiples of 1x
FIRST_STAGE = 0.6  # share of the trials
BASES = (2, 3, 5)  # of the Halton sequence, for G_0, rate and threshold
# Moves from the best point in steps of the grids, in the order in which they are tried: (G_0, rate, threshold).
MOVES = ((0, 1, 0), (1, 0, 0), (0, 0, 1), (0, -1, 0), (0, 0, -1), (-1, 0, 0))


@dataclass(frozen=True)
class Method:
    """A column of table 2.

    Attributes:
        label: the heading of its column.
        optim: the option of ``conf/optim``.
        key: the override of its threshold; None for a method whose threshold is not searched.
        values: of the threshold.
    """

    label: str
    optim: str
    key: str | None = None
    values: tuple[float, ...] = ()


SEARCHED = "clippy_searched"
METHODS: Mapping[str, Method] = {
    "adagrad": Method("adagrad", "adagrad"),
    # The paper's grid, and 1, since losses are averaged over a batch here.
    "gc": Method("gc", "gc", THRESHOLDS["gc"][0], (1.0, *THRESHOLDS["gc"][1])),
    "agc": Method("agc", "agc", *THRESHOLDS["agc"]),
    "lamb": Method("lamb", "lamb", *THRESHOLDS["lamb"]),
    "clippy": Method("clippy, the paper's lambdas", "clippy"),
    # As many values as the other methods have, downward from the paper's own.
    SEARCHED: Method("clippy, lambda_abs searched", "clippy", "optim.lambda_abs", (1e-2, 1e-3, 1e-4)),
}


class Point(NamedTuple):
    """One combination.

    Attributes:
        g0: the accumulators' first value.
        lr_mult: learning rate as a multiple of 1x.
        threshold: of the method; None if it has none.
    """

    g0: float
    lr_mult: float
    threshold: float | None

    def axes(self, model: str, method: str) -> dict[str, Sequence[object]]:
        """The axes of ``grid`` for this combination; the tag names the method in the results."""
        tried = METHODS[method]
        made: dict[str, Sequence[object]] = {
            "model": (model,),
            "optim": (tried.optim,),
            "lr_mult": (self.lr_mult,),
            G_KEY: (self.g0,),
        }
        if tried.key is not None:
            made[tried.key] = (self.threshold,)
        return made | {"tags": (f"[{method}]",)}


def first_points(method: str, trials: int) -> list[Point]:
    """The points of the first stage: distinct, and the same G_0 and rates for every method as far as possible."""
    return list(itertools.islice(_distinct(_sequence(method)), first_stage(trials)))


def next_points(method: str, tried: Sequence[Point], best: Point | None, trials: int) -> list[Point]:
    """The points of the second stage: neighbours of the best one, then further points of the sequence.

    Args:
        method: a key of ``METHODS``.
        tried: points of the first stage.
        best: the best of them; None if every run was lost, so that only the sequence is left.
        trials: of both stages together.
    """
    near = _neighbours(method, best) if best is not None else iter(())
    fresh = (point for point in _distinct(itertools.chain(near, _sequence(method))) if point not in tried)
    return list(itertools.islice(fresh, max(0, trials - len(tried))))


def first_stage(trials: int) -> int:
    """Number of trials in the first stage."""
    return max(1, round(FIRST_STAGE * trials))


def search_jobs(setting: Setting, points: Mapping[tuple[str, str], Sequence[Point]]) -> list[Job]:
    """The jobs of some points, by model and method, on the validation day."""
    common = (*setting.common, *FOLLOWED, *setting.validation)
    return [
        job
        for (model, method), wanted in points.items()
        for point in wanted
        for job in grid(common, {**point.axes(model, method), "seed": (0,)})
    ]


def point_of(run: Mapping[str, object]) -> Point:
    """The combination of a row of results."""
    key = METHODS[str(run["method"])].key
    limit = run[key] if key is not None else None
    return Point(_float(run[G_KEY]), _float(run["lr_mult"]), None if limit is None else _float(limit))


def ranked(search: pl.DataFrame, metric: str) -> pl.DataFrame:
    """The runs of a search, best first; a completed run always comes before one that did not complete.

    Args:
        search: runs of one or more searches.
        metric: higher is better, such as ``is_click/auc``.
    """
    usable = pl.when(pl.col("status") == "completed").then(pl.col(metric)).fill_nan(None).fill_null(-1.0)
    return search.sort(usable, descending=True, maintain_order=True)


def choose(search: pl.DataFrame, metric: str) -> dict[tuple[str, str], Point]:
    """The best combination of each model and method; the first one tried if none completed."""
    chosen: dict[tuple[str, str], Point] = {}
    for run in ranked(search, metric).iter_rows(named=True):
        chosen.setdefault((run["model"], run["method"]), point_of(run))
    return chosen


def _sequence(method: str) -> Iterator[Point]:
    """Halton points on the grids. The grids are finite, so a reader must stop at the size of the space."""
    values = METHODS[method].values
    size = len(G_0) * len(RATES) * max(1, len(values))
    for i in range(1, 50 * size):
        g, r, t = (_van_der_corput(i, base) for base in BASES)
        limit = values[int(t * len(values))] if values else None
        yield Point(G_0[int(g * len(G_0))], RATES[int(r * len(RATES))], limit)


def _neighbours(method: str, point: Point) -> Iterator[Point]:
    values: tuple[float | None, ...] = METHODS[method].values or (None,)
    place = (G_0.index(point.g0), RATES.index(point.lr_mult), values.index(point.threshold))
    for size in (1, 2):
        for move in MOVES:
            g, r, t = (p + size * m for p, m in zip(place, move, strict=True))
            if 0 <= g < len(G_0) and 0 <= r < len(RATES) and 0 <= t < len(values):
                yield Point(G_0[g], RATES[r], values[t])


def _distinct(points: Iterator[Point]) -> Iterator[Point]:
    seen = set()
    for point in points:
        if point not in seen:
            seen.add(point)
            yield point


def _van_der_corput(i: int, base: int) -> float:
    """The digits of i in a base, mirrored at the point."""
    value, share = 0.0, 1.0
    while i:
        i, digit = divmod(i, base)
        share /= base
        value += digit * share
    return value


def _float(value: object) -> float:
    return float(str(value))
