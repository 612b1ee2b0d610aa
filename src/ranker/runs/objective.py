"""The objective of a run: a metric on the hold-out, and which of its values are better."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ranker.errors import UserError, suggest
from ranker.runs.metric_names import TEST, VAL

# Metrics with a direction, without their group and their k: gauc.user is a gauc, ndcg_10.user an ndcg. Calibration is
# best at 1 and the counts are no quality, so they cannot be an objective.
HIGHER_IS_BETTER = ("auc", "r2", "gauc", "ndcg", "recall", "mrr", "xauc")
LOWER_IS_BETTER = ("logloss", "ne", "rmse", "mae", "mae_raw", "ece")
_K = re.compile(r"_\d+$")
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
    metric = kind_of(name)
    if metric not in DIRECTIONS:
        raise UserError(f"objective={name}: '{metric}' has no better or worse; use one of {', '.join(DIRECTIONS)}")
    return DIRECTIONS[metric]


def kind_of(name: str) -> str:
    """The kind of a metric: ``ndcg`` of ``test/click/ndcg_10.user``."""
    return _K.sub("", name.rsplit("/", 1)[-1].split(".", 1)[0])


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


def metrics_of(tasks: Mapping[str, str], more: Iterable[str] = ()) -> list[str]:
    """Names of the metrics that can be an objective.

    Args:
        tasks: type (``binary`` or ``regression``) by name.
        more: names of other metrics of the run, such as ``click/gauc.user``.
    """
    kinds = {"binary": ("auc", "logloss", "ne"), "regression": ("rmse", "r2")}
    found = [f"{TEST}/{task}/{metric}" for task, kind in tasks.items() for metric in kinds[kind]]
    return [*found, *(f"{TEST}/{name}" for name in more if kind_of(name) in DIRECTIONS)]


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
