"""Loss and calibration by segment: by the value of a feature, and by bucket of the prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ranker.data.schema import CategoricalFeature, Schema, Task
from ranker.errors import UserError, suggest
from ranker.metrics.pointwise import entropy
from ranker.metrics.row_metric import RowMetric, Table
from ranker.metrics.rows import Floats, TaskRows, softplus
from ranker.metrics.statistic import Fixed, Statistic


class SegmentedNE(RowMetric):
    """Normalised entropy by the value of a one-hot feature.

        ne of segment s = loss_s / H_s          loss_s sum of the log loss of its rows,
        ne.<feature>    = sum loss / sum H_s    H_s that of always predicting its own share of positives

    So ``ne.<feature>`` is below 1 only if the model knows more than the feature. Segments with one label add their loss
    and no H. The table at the end of training has the largest segments; their others together are in the last row.

    Args:
        feature: name of a one-hot feature, or several.
        max_segments: rows of the table.

    Source: He et al. (2014), Practical Lessons from Predicting Clicks on Ads at Facebook (normalised entropy).
    """

    def __init__(self, *, feature: str | Sequence[str], max_segments: int = 20) -> None:
        self._features = [feature] if isinstance(feature, str) else list(feature)
        if max_segments < 1:
            raise UserError(f"metrics: max_segments must be at least 1, got {max_segments}")
        self._max_segments = max_segments

    def features(self, schema: Schema) -> list[str]:
        """The features.

        Raises:
            UserError: one is not a one-hot feature of the schema.
        """
        known = [feature.name for feature in schema.one_hot]
        for name in self._features:
            if name not in known:
                raise UserError(f"metrics: '{name}' is no one-hot feature of the log; {suggest(name, known)}")
        return self._features

    def names(self, schema: Schema, task: Task) -> list[str]:  # noqa: ARG002
        """``ne.<feature>``."""
        return [f"ne.{name}" for name in self._features]

    def statistics(self, rows: TaskRows) -> Mapping[str, Statistic]:
        """See the class."""
        return {f"ne.{name}": self._overall(name, rows) for name in self._features}

    def tables(self, rows: TaskRows, schema: Schema) -> list[Table]:
        """The segments of each feature, the largest first."""
        return [self._table(name, rows, schema) for name in self._features]

    def _overall(self, name: str, rows: TaskRows) -> Statistic:
        _, _, sums_KS = _by_segment(name, rows)
        baseline = sum(_segment_entropy(*sums) for sums in sums_KS[1:3].T.tolist())
        return Fixed(
            float(sums_KS[0].sum()) / baseline if baseline else math.nan, f"no value of {name} has both labels"
        )

    def _table(self, name: str, rows: TaskRows, schema: Schema) -> Table:
        ids, counts, sums_KS = _by_segment(name, rows)
        feature = next(f for f in schema.one_hot if f.name == name)
        order = np.lexsort([ids, -counts])
        shown = [
            _row(_label(int(ids[s]), feature, schema), counts[s], sums_KS[:, s]) for s in order[: self._max_segments]
        ]
        rest = order[self._max_segments :]
        if len(rest):
            shown.append(_row(f"{len(rest):,} others", counts[rest].sum(), sums_KS[:, rest].sum(axis=1)))
        columns = (name, "rows", "share of positives", "mean prediction", "calibration", "ne")
        return Table(task=rows.task.name, name=f"ne.{name}", columns=columns, rows=shown)


class CalibrationBuckets(RowMetric):
    """Calibration by bucket of the prediction, for a reliability diagram.

        ece = sum over buckets of share_b |mean prediction_b - mean label_b|        expected calibration error

    Rows are sorted by prediction and cut into buckets of equal weight. Rows of equal prediction stay together. The
    table at the end of training has the mean prediction and label of each bucket.

    Args:
        buckets: number of buckets.

    Raises:
        UserError: buckets is below 2.

    Source: Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015
        (ECE); buckets of equal weight as in Nguyen and O'Connor, "Posterior Calibration and Exploratory Analysis for
        Natural Language Processing Models", EMNLP 2015.
    """

    types = ("binary", "regression")

    def __init__(self, *, buckets: int = 20) -> None:
        if buckets < 2:
            raise UserError(f"metrics: buckets must be at least 2, got {buckets}")
        self._buckets = buckets

    def names(self, schema: Schema, task: Task) -> list[str]:  # noqa: ARG002
        """``ece``."""
        return ["ece"]

    def statistics(self, rows: TaskRows) -> Mapping[str, Statistic]:
        """See the class."""
        _, weight_B, prediction_B, label_B = self._sums(rows)
        return {"ece": Fixed(float(np.abs(prediction_B - label_B).sum() / weight_B.sum()))}

    def tables(self, rows: TaskRows, schema: Schema) -> list[Table]:  # noqa: ARG002
        """The buckets, by rising prediction."""
        rows_B, weight_B, prediction_B, label_B = self._sums(rows)
        means = (prediction_B / weight_B, label_B / weight_B)
        shown = [[int(n), float(p), float(y)] for n, p, y in zip(rows_B, *means, strict=True)]
        columns = ("rows", "mean prediction", "mean label")
        return [Table(task=rows.task.name, name="calibration", columns=columns, rows=shown)]

    def _sums(self, rows: TaskRows) -> tuple[Floats, Floats, Floats, Floats]:
        """Of each bucket that is not empty: rows, and sums of weights, predictions and labels."""
        scores, score_N = np.unique(rows.z_N, return_inverse=True)
        weight = np.bincount(score_N, weights=rows.w_N, minlength=len(scores))
        middle = np.cumsum(weight) - weight / 2
        bucket = np.minimum((middle / weight.sum() * self._buckets).astype(np.int64), self._buckets - 1)[score_N]
        weights = (np.ones(len(rows)), rows.w_N, rows.w_N * rows.predictions(), rows.w_N * rows.y_N)
        sums = np.stack([np.bincount(bucket, weights=x, minlength=self._buckets) for x in weights])
        first, second, third, fourth = sums[:, sums[1] > 0]
        return first, second, third, fourth


def _by_segment(name: str, rows: TaskRows) -> tuple[np.ndarray, np.ndarray, Floats]:
    """Embedding rows of the segments, their numbers of rows, and sums [4, S]: loss, weight, positives, prediction."""
    ids, segment_N, counts = np.unique(rows.features[name], return_inverse=True, return_counts=True)
    z, y, w = rows.z_N.astype(np.float64), rows.y_N.astype(np.float64), rows.w_N
    parts = (w * (softplus(z) - y * z), w, w * y, w * rows.predictions())
    return ids, counts, np.stack([np.bincount(segment_N, weights=part, minlength=len(ids)) for part in parts])


def _segment_entropy(weight: float, positives: float) -> float:
    return entropy(weight, positives) if 0 < positives < weight else 0.0


def _row(label: str, count: int, sums_K: Floats) -> list[str | int | float]:
    loss, weight, positives, prediction = (float(x) for x in sums_K)
    baseline = _segment_entropy(weight, positives)
    return [
        label,
        int(count),
        positives / weight,
        prediction / weight,
        prediction / positives if positives else math.nan,
        loss / baseline if baseline else math.nan,
    ]


def _label(row: int, feature: CategoricalFeature, schema: Schema) -> str:
    """The value of a feature that an embedding row stands for."""
    owner = schema.table_of(feature)
    if row == 0:
        return "unknown"
    if owner.vocabulary:
        return str(owner.vocabulary[row - 1])
    return f"bucket {row - 1}" if owner.hash_buckets else str(row - 1)
