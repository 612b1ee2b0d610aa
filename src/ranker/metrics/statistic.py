"""Metrics as functions of weights, so that their confidence intervals come from the same code as their values.

A row of weight w counts like w equal rows. A bootstrap over groups draws groups with replacement, which multiplies the
weights of a group's rows by how often it was drawn. So a metric is computed once and drawn as often as is wanted.

Legend: N rows, U units (rows or groups), K sums, C clusters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ranker.errors import UserError
from ranker.metrics.rows import Floats, Ints, TaskRows, numbered

Draw = Callable[[Ints], float]  # the metric, given how often each cluster was drawn


class Statistic(ABC):
    """The value of a metric, and how it depends on weights.

    Attributes:
        note: why the value is nan.
    """

    note: str = ""

    @property
    @abstractmethod
    def value(self) -> float:
        """The value; nan where it is undefined."""

    @abstractmethod
    def draw(self, cluster_N: Ints, clusters: int) -> Draw | None:
        """The metric as a function of a draw. None: it has no interval.

        Args:
            cluster_N: cluster of each row.
            clusters: C.
        """


@dataclass(frozen=True)
class Fixed(Statistic):
    """A value without an interval."""

    known: float
    note: str = ""

    @property
    def value(self) -> float:
        """The value."""
        return self.known

    def draw(self, cluster_N: Ints, clusters: int) -> Draw | None:  # noqa: ARG002
        """None."""
        return None


@dataclass(frozen=True)
class Sums(Statistic):
    """A function of sums over units: ``function(sum over u of parts_u)``.

    Attributes:
        parts_UK: what each unit adds to each sum.
        function: from the K sums to the value.
        unit_N: unit of each row, -1 for none. None: the rows are the units.
        note: why the value is nan.
    """

    parts_UK: Floats
    function: Callable[[Floats], float]
    unit_N: Ints | None = None
    note: str = ""

    @property
    def value(self) -> float:
        """The function of all units."""
        return self.function(self.parts_UK.sum(axis=0))

    def draw(self, cluster_N: Ints, clusters: int) -> Draw | None:
        """The function of drawn units. None where the rows of a unit are in different clusters."""
        cluster_U = cluster_N
        if self.unit_N is not None:
            inside = self.unit_N >= 0
            cluster_U = np.zeros(len(self.parts_UK), dtype=np.int64)
            cluster_U[self.unit_N[inside]] = cluster_N[inside]
            if np.any(cluster_U[self.unit_N[inside]] != cluster_N[inside]):
                return None
        sums = [np.bincount(cluster_U, weights=part_U, minlength=clusters) for part_U in self.parts_UK.T]
        parts_KC: Floats = np.stack(sums).astype(np.float64)
        return lambda times_C: self.function(parts_KC.dot(times_C))


@dataclass(frozen=True)
class Weighted(Statistic):
    """A function of the weights of all rows, which is computed anew for each draw.

    Attributes:
        function: from weights [N] to the value.
        w_N: the weights of the rows.
        note: why the value is nan.
    """

    function: Callable[[Floats], float]
    w_N: Floats
    note: str = ""

    @property
    def value(self) -> float:
        """The function of the rows' own weights."""
        return self.function(self.w_N)

    def draw(self, cluster_N: Ints, clusters: int) -> Draw | None:  # noqa: ARG002
        """The function of the weights times how often each row was drawn."""
        return lambda times_C: self.function(self.w_N * times_C[cluster_N])


def ratio(sums_K: Floats) -> float:
    """The first sum divided by the second; nan where that is 0."""
    return float(sums_K[0] / sums_K[1]) if sums_K[1] else math.nan


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Confidence intervals by the percentile bootstrap over groups, at the end of training.

        interval = [(1 - level) / 2, (1 + level) / 2] quantiles of the metric over ``resamples`` draws

    A draw takes as many groups as there are, with replacement, and with a group all its rows: the rows of one user
    resemble each other, so a bootstrap over rows would give intervals that are too narrow. Rows without a key are
    groups of their own. The draws depend on the seed and the set of groups alone, and all metrics of a task share them.
    A draw costs one pass over the rows for each AUC, and one over the groups for every other metric.

    Args:
        resamples: number of draws; 0 for no intervals.
        by: name of the group. None: the schema's first, or single rows if it has none.
        level: share of the draws inside the interval, such as 0.95.
        seed: of the draws.

    Raises:
        UserError: a number is out of range.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 8 and 13.
    """

    resamples: int = 0
    by: str | None = None
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 0 or 0 < self.resamples < 20:
            raise UserError(f"metrics.intervals.resamples must be 0 (none) or at least 20, got {self.resamples}")
        if not 0 < self.level < 1:
            raise UserError(f"metrics.intervals.level must be between 0 and 1, got {self.level}")

    def of(
        self, statistics: Mapping[str, Statistic], rows: TaskRows, *, by: str | None
    ) -> dict[str, tuple[float, float]]:
        """The intervals of the metrics of one task, by name. Undefined metrics have none.

        Args:
            statistics: the metrics.
            rows: the rows that they were computed from.
            by: name of the group, one of ``rows.keys``; None for single rows.
        """
        cluster_N, clusters = _clusters(rows, by)
        draws: dict[str, Draw] = {}
        for name, statistic in statistics.items():
            draw = None if math.isnan(statistic.value) else statistic.draw(cluster_N, clusters)
            if draw is not None:
                draws[name] = draw
        found: dict[str, list[float]] = {name: [] for name in draws}
        for times_C in self._draws(clusters) if draws else ():
            for name, draw in draws.items():
                found[name].append(draw(times_C))
        tail = (1.0 - self.level) / 2
        ends = {name: np.nanquantile(values, [tail, 1.0 - tail]) for name, values in found.items()}
        return {name: (float(low), float(high)) for name, (low, high) in ends.items()}

    def _draws(self, clusters: int) -> Iterator[Ints]:
        # RandomState, because NumPy guarantees its draws, whereas those of Generator may change.
        random = np.random.RandomState(self.seed)
        for _ in range(self.resamples):
            yield np.bincount(random.randint(0, clusters, clusters), minlength=clusters)


def _clusters(rows: TaskRows, by: str | None) -> tuple[Ints, int]:
    """Cluster of each row, and their number: groups in the order of their keys, then each row without a key."""
    cluster_N = numbered(rows.keys[by]) if by else np.full(len(rows), -1, dtype=np.int64)
    groups = int(cluster_N.max(initial=-1)) + 1
    alone = np.flatnonzero(cluster_N < 0)
    # In an order that does not depend on which rank read a row.
    order = np.lexsort((rows.w_N[alone], rows.y_N[alone], rows.z_N[alone]))
    cluster_N[alone[order]] = groups + np.arange(len(alone))
    return cluster_N, groups + len(alone)
