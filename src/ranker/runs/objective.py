"""The objective of a run: a metric on the hold-out, and which of its values are better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ranker.errors import UserError, suggest
from ranker.runs.metric_names import TEST, VAL

# Metrics with a direction. Calibration is best at 1 and the counts are no quality, so they cannot be an objective.
HIGHER_IS_BETTER, LOWER_IS_BETTER = ("auc", "r2"), ("logloss", "ne", "rmse")
DIRECTIONS = {**dict.fromkeys(HIGHER_IS_BETTER, "maximize"), **dict.fromkeys(LOWER_IS_BETTER, "minimize")}


def direction(name: str | None) -> str:
    """``maximize`` or ``minimize``.

    Args:
        name: such as ``test/click/auc``; None for the default, which is an AUC.

    Raises:
        UserError: the metric has no direction.
    """
    if name is None:
        return "maximize"
    metric = name.rsplit("/", 1)[-1]
    if metric not in DIRECTIONS:
        raise UserError(f"objective={name}: '{metric}' has no better or worse; use one of {', '.join(DIRECTIONS)}")
    return DIRECTIONS[metric]


def chosen(name: str | None, known: Iterable[str]) -> str | None:
    """The name of the objective among the metrics of a run: as given, or the first AUC.

    Args:
        name: as configured.
        known: names of the metrics, such as ``test/click/auc``.

    Returns:
        None if none is configured and no metric is an AUC.

    Raises:
        UserError: there is no metric of this name, or it has no direction.
    """
    names = list(known)
    if name is None:
        return next((key for key in names if key.endswith("/auc")), None)
    if name not in names:
        raise UserError(f"objective={name} is not a metric of this run; {suggest(name, names)}")
    direction(name)
    return name


def metrics_of(tasks: Mapping[str, str]) -> list[str]:
    """Names of the metrics that can be an objective.

    Args:
        tasks: type (``binary`` or ``regression``) by name.
    """
    kinds = {"binary": ("auc", "logloss", "ne"), "regression": ("rmse", "r2")}
    return [f"{TEST}/{task}/{metric}" for task, kind in tasks.items() for metric in kinds[kind]]


def while_training(name: str) -> str:
    """The name of the same metric in the evaluations during training."""
    return f"{VAL}/{name.removeprefix(f'{TEST}/')}"


def better(value: float, than: float, name: str) -> bool:
    """Whether a finite value of a metric is better than another."""
    return value > than if direction(name) == "maximize" else value < than


def worst(name: str | None) -> float:
    """The value of a lost run: worse than every finite one."""
    return -math.inf if direction(name) == "maximize" else math.inf


def value_of(summary: Mapping[str, Any], name: str | None) -> float:
    """The value of the objective in a summary; the worst one if the run was lost.

    NaN if no objective is configured and the run has no defined AUC: only a sweep that optimises needs one.

    Raises:
        UserError: the configured metric is unknown, has no direction, or is undefined although the run completed.
    """
    metrics = summary["metrics"]
    if summary["status"] != "completed":
        return worst(name)
    known = chosen(name, metrics)
    value = None if known is None else metrics[known]
    if value is not None and math.isfinite(value):  # None is a NaN read from summary.json
        return float(value)
    if name is not None:
        raise UserError(f"objective={name} is undefined on this hold-out, for example because all its labels are equal")
    return math.nan
