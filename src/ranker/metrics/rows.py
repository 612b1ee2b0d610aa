"""The predictions and labels of one task as columns, and its rows by group and score. A metric is computed from these.

Everything is vectorised over rows and groups, on the CPU. Legend: N rows, G groups, R runs (rows of one group with the
same score).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ranker.data.batch import NO_GROUP
from ranker.data.schema import Task

Floats = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_SCORE_BITS = 32
_Number = TypeVar("_Number", np.float64, np.int64)


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The observed rows of one task, of all ranks. All predictions are finite.

    Attributes:
        task: the task.
        z_N: float32, predictions: the logit of a binary task, the value of a regression.
        y_N: float32, labels.
        w_N: float64, weights of the rows; 1 where the schema has none.
        keys: int64 [N] by name of a group, the key of each row; NO_GROUP for none.
        features: int64 [N] by name of a one-hot feature, the row of its embedding table.
    """

    task: Task
    z_N: Single
    y_N: Single
    w_N: Floats
    keys: dict[str, Ints] = field(default_factory=dict)
    features: dict[str, Ints] = field(default_factory=dict)
    _ranked: dict[str, Ranked] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.z_N)

    def predictions(self) -> Floats:
        """Probabilities of a binary task, values of a regression."""
        z_N = self.z_N.astype(np.float64)
        return sigmoid(z_N) if self.task.type == "binary" else z_N

    def ranked(self, group: str) -> Ranked:
        """The rows by a group. Kept, because several metrics ask for it."""
        if group not in self._ranked:
            self._ranked[group] = Ranked.of(self.keys[group], self)
        return self._ranked[group]


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Rows by group and, inside a group, by falling score. Rows without a key are left out.

    Rows of equal score form a run, because a metric must not depend on their order.

    Attributes:
        group_N: int64, number of each row's group, 0 .. G-1 in the order of the keys; -1 without a key.
        order_M: int64, the rows of the groups in this order; M <= N.
        first_R: int64, place of the first row of each run in ``order_M``.
        group_R: int64, group of each run.
        rows_R: int64, rows of each run.
        before_R: int64, rows of the group with a higher score.
        positives_R: float64, rows with label 1.
        positive_R: float64, sum of their weights.
        negative_R: float64, sum of the weights of the others.
        first_G: int64, first run of each group.
        rows_G: int64, rows of each group.
        weight_G: float64, sum of their weights.
    """

    group_N: Ints
    order_M: Ints
    first_R: Ints
    group_R: Ints
    rows_R: Ints
    before_R: Ints
    positives_R: Floats
    positive_R: Floats
    negative_R: Floats
    first_G: Ints
    rows_G: Ints
    weight_G: Floats

    @classmethod
    def of(cls, key_N: Ints, rows: TaskRows) -> Ranked:
        """Sorts the rows of a task: one sort of the keys, one of (group, score)."""
        group_N = numbered(key_N)
        known = np.flatnonzero(group_N >= 0)
        # Group and score in one integer: one sort of these is several times as fast as a sort by two keys.
        code = (group_N[known] << _SCORE_BITS) | _falling(rows.z_N[known])
        place = np.argsort(code)
        code, order_M = code[place], known[place]
        first_R = _starts(code)
        group_R = code[first_R] >> _SCORE_BITS if len(code) else code
        rows_R = np.diff(np.append(first_R, len(code)))
        first_G = _starts(group_R)
        y, w = rows.y_N[order_M].astype(np.float64), rows.w_N[order_M]
        sums = [_sums(x, first_R) for x in (y, w * y, w * (1.0 - y))]
        before = np.cumsum(rows_R) - rows_R
        counts = _sums(rows_R, first_G)
        return cls(
            group_N=group_N,
            order_M=order_M,
            first_R=first_R,
            group_R=group_R,
            rows_R=rows_R,
            before_R=before - np.repeat(before[first_G], np.diff(np.append(first_G, len(first_R)))),
            positives_R=sums[0],
            positive_R=sums[1],
            negative_R=sums[2],
            first_G=first_G,
            rows_G=counts,
            weight_G=_sums(sums[1] + sums[2], first_G),
        )

    def by_group(self, values_R: Floats) -> Floats:
        """Sum over the runs of each group, [G]."""
        return _sums(values_R, self.first_G)

    def to_runs(self, values_G: Floats) -> Floats:
        """The value of each run's group, [R]."""
        return values_G[self.group_R]

    def below(self, values_R: Floats) -> Floats:
        """Sum over the runs of the same group with a lower score, [R]."""
        through_R = np.cumsum(values_R)
        ends_G = (np.append(self.first_G[1:], len(values_R)) - 1)[: len(self.first_G)]
        return self.to_runs(through_R[ends_G]) - through_R


def numbered(key_N: Ints) -> Ints:
    """Number of each row's key in the order of the keys, int64 [N]; -1 for NO_GROUP."""
    keys, group_N = np.unique(key_N, return_inverse=True)
    return group_N.astype(np.int64) - int(len(keys) > 0 and keys[0] == NO_GROUP)


def sigmoid(z: Floats) -> Floats:
    """1 / (1 + exp(-z)), without an overflow."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


def softplus(z: Floats) -> Floats:
    """log(1 + exp(z)), without an overflow."""
    return np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z)))


def _falling(z: Single) -> Ints:
    """Integers of 32 bits that rise where finite scores fall, equal for equal scores."""
    bits = (z + np.float32(0.0)).view(np.int32).astype(np.int64)  # + 0 turns -0 into 0
    rising = np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    return 2**31 - rising


def _starts(sorted_values: Ints) -> Ints:
    """Places at which a new value begins."""
    if len(sorted_values) == 0:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(np.append(True, sorted_values[1:] != sorted_values[:-1]))


def _sums(values: npt.NDArray[_Number], first: Ints) -> npt.NDArray[_Number]:
    """Sums of consecutive values, from each start to the next."""
    return np.add.reduceat(values, first) if len(first) else values[:0]
