"""What a task's predictions are worth beside a constant one, from the metrics on the hold-out."""

from __future__ import annotations

import math
from collections.abc import Mapping

AUC_OF_CHANCE = 0.52  # below it a model ranks no better than a constant; the gate's floor is the same by default


def relative_loss(metrics: Mapping[str, float | None], task: str) -> float:
    """The loss of a task divided by that of the best constant prediction on the same rows; nan where it is unknown.

    The normalised entropy of a binary task, and 1 - R2 = MSE / variance of the labels of a regression.

    Args:
        metrics: by ``<task>/<metric>``, as from ``TaskMetrics``; a value may be None for nan, as in summary.json.
        task: name of the task.
    """
    entropy, r2 = (_number(metrics, task, name) for name in ("ne", "r2"))
    return 1.0 - r2 if math.isnan(entropy) else entropy


def no_better_than_constant(metrics: Mapping[str, float | None]) -> list[str]:
    """Names of the tasks that a constant prediction would do as well: by the loss (NE >= 1, R2 <= 0) or by the AUC.

    An AUC below ``AUC_OF_CHANCE`` is of a model that learned nothing, although its loss may be just below that of the
    base rate.

    Args:
        metrics: those of the hold-out, as of ``relative_loss``.
    """
    tasks = dict.fromkeys(key.split("/")[0] for key in metrics)
    return [t for t in tasks if relative_loss(metrics, t) >= 1.0 or _number(metrics, t, "auc") < AUC_OF_CHANCE]


def _number(metrics: Mapping[str, float | None], task: str, name: str) -> float:
    value = metrics.get(f"{task}/{name}")
    return math.nan if value is None else float(value)
