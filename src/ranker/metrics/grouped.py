"""Ranking metrics of binary tasks inside groups, such as users or sessions: gAUC, NDCG@k, MRR, recall@k.

Rows of equal score have no order. Their metric is the mean over all orders, so it depends neither on the order of the
log nor on batches or ranks, and a model that gives every row the same score gets what chance gives. Rows without a key
are left out. Legend as in ``ranker.metrics.rows``.

With row weights, gAUC is weighted row by row. The others are about places in a list: there a row has one place, and a
group counts with the mean weight of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ranker.errors import UserError
from ranker.metrics.row_metric import GroupedMetric
from ranker.metrics.rows import Floats, Ints, Ranked
from ranker.metrics.statistic import Statistic, Sums, ratio


class GroupAUC(GroupedMetric):
    """gAUC: mean of the groups' AUCs, weighted by their impressions.

        gauc = sum over g of n_g AUC_g / sum over g of n_g        n_g sum of the weights of the group's rows

    over groups with both labels. Names: ``gauc.<group>``, and ``gauc_rows.<group>``, the share of the rows that are in
    such a group.

    Args:
        group: see ``GroupedMetric``.

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017 (GAUC).
    """

    def values(self) -> list[str]:
        """``gauc`` and ``gauc_rows``."""
        return ["gauc", "gauc_rows"]

    def in_groups(self, ranked: Ranked) -> Mapping[str, Statistic]:
        """See the class."""
        positive_G, negative_G = ranked.by_group(ranked.positive_R), ranked.by_group(ranked.negative_R)
        right_R = ranked.positive_R * (ranked.below(ranked.negative_R) + ranked.negative_R / 2)
        pairs_G = positive_G * negative_G
        mixed_G = pairs_G > 0
        auc_G = ranked.by_group(right_R) / np.where(mixed_G, pairs_G, 1.0)
        n_G = ranked.weight_G * mixed_G
        return {
            "gauc": Sums(np.stack([n_G * auc_G, n_G], axis=1), ratio, ranked.group_N, "no group has both labels"),
            "gauc_rows": Sums(np.stack([n_G, ranked.weight_G], axis=1), ratio, ranked.group_N, "no row has a group"),
        }


class _Listed(GroupedMetric):
    """A mean over the groups that have a positive row."""

    def mean(self, values_G: Floats, ranked: Ranked) -> Statistic:
        """The mean of a value over these groups, each with the mean weight of its rows."""
        weight_G = ranked.weight_G / np.maximum(ranked.rows_G, 1) * (ranked.by_group(ranked.positives_R) > 0)
        parts_GK = np.stack([np.where(weight_G > 0, weight_G * values_G, 0.0), weight_G], axis=1)
        return Sums(parts_GK, ratio, ranked.group_N, "no group has a positive label")


class _AtK(_Listed):
    """A metric of the first k places, for several k."""

    name = ""

    def __init__(self, *, k: int | Sequence[int] = 10, group: str | Sequence[str] | None = None) -> None:
        super().__init__(group=group)
        self._k = [k] if isinstance(k, int) else list(k)
        for value in self._k:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"metrics: k of {self.name} must be a whole number of at least 1, got {value}")

    def values(self) -> list[str]:
        """``<name>_<k>`` for each k."""
        return [f"{self.name}_{k}" for k in self._k]

    def in_groups(self, ranked: Ranked) -> Mapping[str, Statistic]:
        """See the class."""
        positives_G = np.maximum(ranked.by_group(ranked.positives_R), 1.0)
        return {f"{self.name}_{k}": self.mean(self.at(k, ranked, positives_G), ranked) for k in self._k}

    def at(self, k: int, ranked: Ranked, positives_G: Floats) -> Floats:
        """The metric of each group, [G]."""
        raise NotImplementedError


class NDCG(_AtK):
    """Normalised discounted cumulative gain of the first k places, mean over the groups with a positive row.

        DCG_g  = sum over places r <= k of y_r / log2(r + 1)
        NDCG_g = DCG_g / DCG_g of the best order

    Names: ``ndcg_<k>.<group>``.

    Args:
        k: number of places, or several.
        group: see ``GroupedMetric``.

    Raises:
        UserError: a k is below 1.

    Source: Järvelin and Kekäläinen, "Cumulated Gain-Based Evaluation of IR Techniques", ACM TOIS 2002; ties by McSherry
        and Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores",
        ECIR 2008.
    """

    name = "ndcg"

    def at(self, k: int, ranked: Ranked, positives_G: Floats) -> Floats:
        """See the class."""
        discounts = np.append(0.0, np.cumsum(1.0 / np.log2(np.arange(2, k + 2))))  # of the first 0, 1, .. k places
        first, last = np.minimum(ranked.before_R, k), np.minimum(ranked.before_R + ranked.rows_R, k)
        gain_R = ranked.positives_R * (discounts[last] - discounts[first]) / ranked.rows_R
        return ranked.by_group(gain_R) / discounts[np.minimum(positives_G, k).astype(np.int64)]


class Recall(_AtK):
    """Share of a group's positive rows that are in the first k places, mean over the groups with a positive row.

    Names: ``recall_<k>.<group>``.

    Args:
        k: number of places, or several.
        group: see ``GroupedMetric``.

    Raises:
        UserError: a k is below 1.
    """

    name = "recall"

    def at(self, k: int, ranked: Ranked, positives_G: Floats) -> Floats:
        """See the class."""
        inside_R = np.minimum(ranked.before_R + ranked.rows_R, k) - np.minimum(ranked.before_R, k)
        return ranked.by_group(ranked.positives_R * inside_R / ranked.rows_R) / positives_G


class MRR(_Listed):
    """Mean reciprocal rank: 1 / place of the first positive row, mean over the groups with a positive row.

    Names: ``mrr.<group>``. Of m rows with the same score, p of them positive, behind a others, the first positive one
    is in place a + j with probability C(m - j, p - 1) / C(m, p).

    Args:
        group: see ``GroupedMetric``.
    """

    def values(self) -> list[str]:
        """``mrr``."""
        return ["mrr"]

    def in_groups(self, ranked: Ranked) -> Mapping[str, Statistic]:
        """See the class."""
        hit_R = np.flatnonzero(ranked.positives_R)
        _, place = np.unique(ranked.group_R[hit_R], return_index=True)
        first_R = hit_R[place]  # the first run with a positive row, of each group that has one
        values_G = np.zeros(len(ranked.rows_G))
        values_G[ranked.group_R[first_R]] = _expected_reciprocal(
            ranked.before_R[first_R], ranked.rows_R[first_R], ranked.positives_R[first_R].astype(np.int64)
        )
        return {"mrr": self.mean(values_G, ranked)}


def _expected_reciprocal(before: Ints, rows: Ints, positives: Ints) -> Floats:
    """Expected 1 / place of the first positive of some runs."""
    start = np.cumsum(rows) - rows
    run = np.repeat(np.arange(len(rows)), rows)
    j = np.arange(len(run)) - start[run] + 1
    m, p = rows[run], positives[run]
    possible = j <= m - p + 1
    m, p, j, run = m[possible], p[possible], j[possible], run[possible]
    chance = np.exp(_log_choose(m - j, p - 1) - _log_choose(m, p))
    return np.bincount(run, weights=chance / (before[run] + j), minlength=len(rows)).astype(np.float64)


def _log_choose(n: Ints, k: Ints) -> Floats:
    parts = (torch.lgamma(torch.from_numpy(x).double() + 1).numpy() for x in (n, k, n - k))
    all_, chosen, left = parts
    return all_ - chosen - left
