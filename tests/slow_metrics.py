"""Metrics by their definitions, in plain loops over rows and groups."""

from __future__ import annotations

import itertools
import math

import numpy as np

from ranker.data.batch import NO_GROUP


def groups_of(keys):
    return [np.flatnonzero(keys == key) for key in np.unique(keys) if key != NO_GROUP]


def auc(z, y, w):
    right = pairs = 0.0
    for i in np.flatnonzero(y > 0.5):
        for j in np.flatnonzero(y <= 0.5):
            right += w[i] * w[j] * ((z[i] > z[j]) + 0.5 * (z[i] == z[j]))
            pairs += w[i] * w[j]
    return right / pairs if pairs else math.nan


def gauc(z, y, w, keys):
    total = weights = 0.0
    for rows in groups_of(keys):
        one = auc(z[rows], y[rows], w[rows])
        if not math.isnan(one):
            total += w[rows].sum() * one
            weights += w[rows].sum()
    return total / weights if weights else math.nan


def over_orders(metric):
    """The mean of a metric of one list over all orders of rows with equal scores."""

    def mean(z, y):
        values = []
        runs = [np.flatnonzero(z == score) for score in sorted(set(z.tolist()), reverse=True)]
        for orders in itertools.product(*(itertools.permutations(run) for run in runs)):
            values.append(metric(y[list(itertools.chain(*orders))].astype(float)))
        return float(np.mean(values))

    return mean


def ndcg(k):
    def one(labels):
        gain = sum(label / math.log2(place + 2) for place, label in enumerate(labels[:k]))
        best = sum(label / math.log2(place + 2) for place, label in enumerate(sorted(labels, reverse=True)[:k]))
        return gain / best

    return over_orders(one)


def recall(k):
    return over_orders(lambda labels: sum(labels[:k]) / sum(labels))


mrr = over_orders(lambda labels: 1.0 / (1 + list(labels).index(1)))


def over_groups(metric, z, y, w, keys):
    values, weights = [], []
    for rows in groups_of(keys):
        if y[rows].any():
            values.append(metric(z[rows], y[rows]))
            weights.append(w[rows].mean())
    return float(np.average(values, weights=weights)) if values else math.nan


def xauc(z, y, w):
    right = pairs = 0.0
    for i, j in itertools.permutations(range(len(z)), 2):
        if y[i] > y[j]:
            right += w[i] * w[j] * ((z[i] > z[j]) + 0.5 * (z[i] == z[j]))
            pairs += w[i] * w[j]
    return right / pairs if pairs else math.nan
