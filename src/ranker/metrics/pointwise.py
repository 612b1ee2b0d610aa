"""Metrics of single rows: those that every run has, as functions of weights for their intervals, and errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ranker.data.schema import Schema, Task
from ranker.metrics.row_metric import RowMetric
from ranker.metrics.rows import Floats, TaskRows, softplus
from ranker.metrics.statistic import Statistic, Sums, Weighted, ratio


def weighted_auc(z_N: npt.NDArray[np.generic], y_N: npt.NDArray[Any], w_N: Floats) -> float:
    """Area under the ROC curve of weighted rows, ties counted half. nan without both labels.

    sum over positives i, negatives j of w_i w_j ([z_i > z_j] + [z_i = z_j] / 2) / sum of w_i w_j
    """
    return _AUC(z_N, y_N)(w_N)


class _AUC:
    """The AUC as a function of the weights: the rows are sorted once."""

    def __init__(self, z_N: npt.NDArray[np.generic], y_N: npt.NDArray[Any]) -> None:
        self._order = np.argsort(z_N, kind="stable")
        sorted_z = z_N[self._order]
        new = np.append(True, sorted_z[1:] != sorted_z[:-1]) if len(z_N) else np.zeros(0, dtype=bool)
        self._first = np.flatnonzero(new)
        self._positive = y_N[self._order] > 0.5

    def __call__(self, w_N: Floats) -> float:
        w = w_N[self._order]
        positive = np.add.reduceat(w * self._positive, self._first) if len(w) else w
        negative = np.add.reduceat(w * ~self._positive, self._first) if len(w) else w
        pairs = positive.sum() * negative.sum()
        if not pairs:
            return math.nan
        below = np.cumsum(negative) - negative / 2
        return float(positive @ below / pairs)


class Standard(RowMetric):
    """What ``TaskMetrics`` computes of every run, from rows: AUC, log loss, NE; RMSE, R2; calibration."""

    types = ("binary", "regression")

    def names(self, schema: Schema, task: Task) -> list[str]:  # noqa: ARG002
        """None of its own."""
        return []

    def statistics(self, rows: TaskRows) -> Mapping[str, Statistic]:
        """As functions of weights."""
        w, y, z = rows.w_N, rows.y_N.astype(np.float64), rows.z_N.astype(np.float64)
        calibration = Sums(np.stack([w * rows.predictions(), w * y], axis=1), ratio)
        if rows.task.type == "binary":
            loss = np.stack([w * (softplus(z) - y * z), w, w * y], axis=1)
            return {
                "auc": Weighted(_AUC(rows.z_N, rows.y_N), w),
                "logloss": Sums(loss, ratio),
                "ne": Sums(loss, _normalised_entropy),
                "calibration": calibration,
            }
        errors = np.stack([w * (z - y) ** 2, w, w * y, w * y * y], axis=1)
        return {
            "rmse": Sums(errors, lambda sums_K: math.sqrt(ratio(sums_K))),
            "r2": Sums(errors, _r2),
            "calibration": calibration,
        }


class MAE(RowMetric):
    """Mean absolute error of regressions.

        mae     = mean |z - y|                  in the units that the model is trained on (log1p seconds)
        mae_raw = mean |f(z) - f(y)|            in the units of the column (milliseconds); f inverts scale and transform

    ``mae_raw`` is there for tasks with a scale or a transform.
    """

    types = ("regression",)

    def names(self, schema: Schema, task: Task) -> list[str]:  # noqa: ARG002
        """``mae``, and ``mae_raw`` where it differs."""
        return ["mae", "mae_raw"] if task.transform != "none" or task.scale != 1.0 else ["mae"]

    def statistics(self, rows: TaskRows) -> Mapping[str, Statistic]:
        """See the class."""
        z, y = rows.z_N.astype(np.float64), rows.y_N.astype(np.float64)
        found = {"mae": _mean(np.abs(z - y), rows.w_N)}
        if rows.task.transform != "none" or rows.task.scale != 1.0:
            found["mae_raw"] = _mean(np.abs(_raw(z, rows.task) - _raw(y, rows.task)), rows.w_N)
        return found


def _mean(values_N: Floats, w_N: Floats) -> Statistic:
    return Sums(np.stack([w_N * values_N, w_N], axis=1), ratio, note="a prediction is too large for its units")


def _raw(values: Floats, task: Task) -> Floats:
    if task.transform == "log1p":
        with np.errstate(over="ignore"):
            values = np.copysign(np.expm1(np.abs(values)), values)
    return values / task.scale


def _normalised_entropy(sums_K: Floats) -> float:
    loss, n, positives = (float(x) for x in sums_K)
    return loss / entropy(n, positives) if 0 < positives < n else math.nan


def entropy(n: float, positives: float) -> float:
    """-n (b log b + (1 - b) log(1 - b)), b = positives / n: the loss of always predicting the share of positives."""
    b = positives / n
    return -n * (b * math.log(b) + (1 - b) * math.log1p(-b))


def _r2(sums_K: Floats) -> float:
    error, n, label, square = (float(x) for x in sums_K)
    variance = square / n - (label / n) ** 2
    return 1.0 - error / n / variance if variance > 1e-12 * max(1.0, square / n) else math.nan
