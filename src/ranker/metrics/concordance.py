"""XAUC: the share of pairs of rows that a regression orders as their labels are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ranker.data.schema import Schema, Task
from ranker.metrics.row_metric import RowMetric
from ranker.metrics.rows import Floats, Ints, TaskRows
from ranker.metrics.statistic import Fixed, Statistic


class XAUC(RowMetric):
    """Share of the pairs of rows with different labels that the predictions order alike, ties counted half.

        xauc = sum over y_i > y_j of w_i w_j ([z_i > z_j] + [z_i = z_j] / 2) / sum over y_i > y_j of w_i w_j

    All pairs count, none is sampled. With labels 0 and 1 it is the AUC. It has no interval: a draw would cost as much
    as the metric.

    Source: Zhan et al., "Deconfounding Duration Bias in Watch-time Prediction for Video Recommendation", KDD 2022,
        where pairs are sampled.
    """

    types = ("regression",)

    def names(self, schema: Schema, task: Task) -> list[str]:  # noqa: ARG002
        """``xauc``."""
        return ["xauc"]

    def statistics(self, rows: TaskRows) -> Mapping[str, Statistic]:
        """See the class."""
        value = concordance(rows.z_N, rows.y_N, rows.w_N)
        return {"xauc": Fixed(value, "all observed labels are the same")}


def concordance(z_N: npt.NDArray[np.floating], y_N: npt.NDArray[np.floating], w_N: Floats) -> float:
    """XAUC in O(N log N): a merge tree over the rows in the order of their labels, each level in a few passes.

    Rows stand in blocks of 2^l places in the order of labels, each block in the order of scores. A running sum over a
    block counts, for each row of its right half (the larger labels), the rows of its left half with a lower score.

    Returns:
        nan if all labels are the same.
    """
    by_label = np.lexsort([z_N, y_N])
    z, y, w = z_N[by_label], y_N[by_label], w_N[by_label]
    same_label = _tied(y[1:] == y[:-1], w)
    same_both = _tied((y[1:] == y[:-1]) & (z[1:] == z[:-1]), w)
    squares, total = float(w @ w), float(w.sum())
    pairs = (total**2 - float(same_label @ same_label)) / 2
    if not pairs > 0:
        return math.nan
    right = _ordered_pairs(np.unique(z, return_inverse=True)[1].astype(np.int64), w)
    # Rows of one label stand in the order of their scores, so all of their pairs were counted, those of one score half.
    strict = (float(same_label @ same_label) - float(same_both @ same_both)) / 2
    half = (float(same_both @ same_both) - squares) / 4
    return (right - strict - half) / pairs


def _ordered_pairs(score: Ints, w: Floats) -> float:
    """Sum over places i < j of w_i w_j ([score_i < score_j] + [score_i = score_j] / 2)."""
    rows = len(score)
    place = np.argsort(score, kind="stable")  # of each row, its place in the order of labels
    index = np.arange(rows)
    found = 0.0
    for level in reversed(range(max(rows - 1, 0).bit_length())):
        block, is_left = place >> (level + 1), (place >> level) & 1 == 0
        scores, weights = score[place], w[place]
        # Left weights before each row; averaged over the start and the end of its run of equal scores in the block.
        before = np.append(0.0, np.cumsum(np.where(is_left, weights, 0.0)))
        new = np.append(True, (scores[1:] != scores[:-1]) | (block[1:] != block[:-1]))
        first = np.flatnonzero(new)
        run = np.cumsum(new) - 1
        ends = np.append(first[1:], rows)
        start_of_block = np.minimum(block << (level + 1), rows)
        lower = ((before[first] + before[ends]) / 2)[run] - before[start_of_block]
        found += float(np.where(is_left, 0.0, weights) @ lower)
        # A stable partition of each block into its halves, which are the blocks of the next level.
        left_before = np.cumsum(is_left) - is_left - (block << level)
        right_before = index - start_of_block - left_before
        target = start_of_block + np.where(is_left, left_before, (1 << level) + right_before)
        moved = np.empty_like(place)
        moved[target] = place
        place = moved
    return found


def _tied(same_as_before: npt.NDArray[np.bool_], w: Floats) -> Floats:
    """Sum of the weights of each run of equal neighbours."""
    return np.add.reduceat(w, np.flatnonzero(np.append(True, ~same_as_before)))
