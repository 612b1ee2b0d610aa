"""A day's model is held against the one that is served, on the same rows."""

from __future__ import annotations

import math

import pytest

from ranker.daily.judge import compared
from ranker.stability.gate import Evidence, GateSettings

SETTINGS = GateSettings(
    statuses=["completed"],
    tasks=None,
    min_positives=20,
    min_judged=1,
    min_auc=0.52,
    max_auc_drop=0.01,
    noise=2.0,
    min_calibration=0.5,
    max_calibration=2.0,
    max_relative_loss=1.0,
    agreement_rows=10,
    max_difference=1e-4,
)


def evidence(auc: float, *, positives: int = 50_000) -> Evidence:
    return Evidence(
        status="completed",
        tasks={"click": "binary", "watch": "regression"},
        metrics={"click/auc": auc},
        rows={"click": 2 * positives, "watch": 10},
        positives={"click": positives, "watch": 0},
    )


@pytest.mark.parametrize(
    ("auc", "passed"), [(0.75, True), (0.74, True), (0.735, True), (0.72, False), (0.5, False), (math.nan, False)]
)
def test_an_auc_may_be_a_little_below_that_of_the_served_model(auc: float, passed: bool) -> None:
    # Of 50,000 positives and as many negatives, two standard errors are 0.003; with 0.013 allowed, 0.735 may be chance.
    (check,) = compared(evidence(auc), {"click/auc": 0.747}, SETTINGS, 0.01)
    assert check.passed is passed
    assert "of the served model on the same rows" in check.words


def test_few_rows_and_other_tasks_are_not_compared() -> None:
    assert compared(evidence(0.5, positives=10), {"click/auc": 0.9}, SETTINGS, 0.01) == []
    assert compared(evidence(0.5), {"buy/auc": 0.9}, SETTINGS, 0.01) == []
