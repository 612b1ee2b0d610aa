"""The rules of the quality gate, on hand-made evidence."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from ranker.errors import UserError
from ranker.stability.gate import Evidence, GateSettings, auc_standard_error, judge

DEFAULT = Path(__file__).resolve().parents[3] / "conf" / "gate" / "default.yaml"
SETTINGS = GateSettings(
    statuses=["completed"],
    tasks=None,
    min_positives=20,
    min_judged=1,
    min_auc=0.6,
    max_auc_drop=0.01,
    noise=0.0,
    min_calibration=0.5,
    max_calibration=2.0,
    max_relative_loss=1.0,
    agreement_rows=100,
    max_difference=1e-4,
)
GOOD = Evidence(
    status="completed",
    tasks={"click": "binary", "watch": "regression"},
    metrics={
        "click/auc": 0.7,
        "click/ne": 0.9,
        "click/calibration": 1.1,
        "watch/r2": 0.2,
        "watch/calibration": 0.9,
    },
    rows={"click": 1000, "watch": 1000},
    positives={"click": 300, "watch": 0},
    best_auc={"click": (0.705, 40)},
    differences={"pt2": 0.0, "onnx": 3e-6},
)


def reasons(settings: GateSettings = SETTINGS, **changed: Any) -> list[str]:
    return judge(dataclasses.replace(GOOD, **changed), settings).reasons


def with_metrics(**metrics: float) -> dict[str, float]:
    return {**GOOD.metrics, **{name.replace("_", "/"): value for name, value in metrics.items()}}


def test_a_good_model_passes_and_every_rule_was_asked() -> None:
    verdict = judge(GOOD, SETTINGS)

    assert verdict.passed
    assert {check.rule for check in verdict.checks} == {
        "statuses",
        "finite",
        "min_judged",
        "min_auc",
        "max_auc_drop",
        "calibration",
        "max_relative_loss",
        "max_difference",
    }


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"status": "diverged", "reason": "AUC back at 0.5"}, "run: its status is diverged (AUC back at 0.5)"),
        ({"status": "running"}, "run: its status is running"),
        ({"nonfinite_weights": ["a", "b", "c", "d"]}, "weights: NaN or infinity in a, b, c and 1 more"),
        ({"metrics": with_metrics(click_nonfinite=3.0)}, "click predictions: 3 of 1,000 are NaN or infinite"),
        ({"metrics": with_metrics(click_auc=0.5), "best_auc": {}}, "click AUC: 0.5000"),
        ({"metrics": with_metrics(click_auc=math.nan), "best_auc": {}}, "click AUC: nan"),
        ({"best_auc": {"click": (0.72, 40)}}, "0.7200 at its best (step 40)"),
        ({"metrics": with_metrics(click_calibration=2.5)}, "click calibration: mean prediction / mean label is 2.500"),
        ({"metrics": with_metrics(watch_calibration=0.1)}, "watch calibration"),
        ({"metrics": with_metrics(watch_calibration=math.nan)}, "watch calibration"),
        ({"differences": {"pt2": 0.0, "onnx": 2e-4}}, "exported onnx: differs from the eager model by 0.0002"),
        ({"differences": {"pt2": math.nan}}, "exported pt2"),
    ],
)
def test_each_fault_alone_is_one_reason(changed: dict[str, Any], told: str) -> None:
    found = reasons(**changed)

    assert len(found) == 1
    assert told in found[0]


def test_all_reasons_are_given_not_the_first_alone() -> None:
    broken = with_metrics(click_auc=math.nan, click_nonfinite=9.0, click_calibration=math.nan)

    assert len(reasons(status="diverged", nonfinite_weights=["w"], metrics=broken)) == 6


def test_a_drop_or_floor_within_chance_is_forgiven() -> None:
    forgiving = dataclasses.replace(SETTINGS, noise=2.0)
    changed = {"metrics": with_metrics(click_auc=0.59), "best_auc": {"click": (0.64, 8)}}

    assert len(reasons(**changed)) == 2
    assert reasons(forgiving, **changed) == []


def test_the_calibration_of_a_task_with_few_positives_has_more_room() -> None:
    forgiving = dataclasses.replace(SETTINGS, noise=2.0)
    changed = {"metrics": with_metrics(click_calibration=2.6), "positives": {"click": 36, "watch": 0}}

    assert len(reasons(**changed)) == 1
    assert reasons(forgiving, **changed) == []  # up to 2 * (1 + 2 / 6)


def test_evaluations_of_a_part_of_the_hold_out_leave_more_to_chance() -> None:
    settings = dataclasses.replace(SETTINGS, noise=1.0)
    changed = {"best_auc": {"click": (0.74, 8)}}

    assert len(reasons(settings, **changed)) == 1
    assert reasons(settings, best_share=0.1, **changed) == []


def test_a_task_with_hardly_a_positive_is_not_judged_and_that_is_said() -> None:
    verdict = judge(dataclasses.replace(GOOD, positives={"click": 19, "watch": 0}), SETTINGS)

    assert verdict.passed
    assert [check.about for check in verdict.checks if check.passed is None] == [
        "click AUC",
        "click calibration",
        "click loss",
    ]


def test_only_chosen_tasks_are_judged_and_an_unknown_one_is_refused() -> None:
    broken = with_metrics(click_auc=0.5)

    assert reasons(dataclasses.replace(SETTINGS, tasks=["watch"]), metrics=broken) == []
    with pytest.raises(UserError, match="no task 'clik'; did you mean 'click'"):
        reasons(dataclasses.replace(SETTINGS, tasks=["clik"]))


def test_the_standard_error_of_an_auc_is_that_of_hanley_and_mcneil() -> None:
    # One positive and one negative: a coin that shows 1 with probability A, whose variance is A (1 - A).
    assert auc_standard_error(0.75, 1, 1) == pytest.approx(math.sqrt(0.75 * 0.25))
    # A = 0.5: Q1 = Q2 = 1/3, so 0.25 + 9/12 + 19/12 over 200.
    assert auc_standard_error(0.5, 10, 20) == pytest.approx(math.sqrt((0.25 + 9 / 12 + 19 / 12) / 200))
    assert math.isnan(auc_standard_error(0.7, 0, 5))


def test_the_file_of_defaults_names_every_setting_once() -> None:
    values = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))

    assert set(values) == {field.name for field in dataclasses.fields(GateSettings)}
    GateSettings(**values)


@pytest.mark.parametrize(("name", "value"), [("min_auc", -0.1), ("min_positives", 0), ("tasks", "click")])
def test_a_setting_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"gate: {name}"):
        dataclasses.replace(SETTINGS, **{name: value})


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("click_ne", 1.2, "click loss: 1.2x that of a constant"),
        ("watch_r2", -0.5, "watch loss: 1.5x that of a constant"),
    ],
)
def test_a_task_no_better_than_a_constant_is_refused_unless_it_is_allowed(metric: str, value: float, said: str) -> None:
    worse = with_metrics(**{metric: value})
    (reason,) = reasons(metrics=worse)
    assert reason.startswith(said)
    assert reasons(dataclasses.replace(SETTINGS, max_relative_loss=2.0), metrics=worse) == []
    assert (
        reasons(dataclasses.replace(SETTINGS, tasks=["click" if metric == "watch_r2" else "watch"]), metrics=worse)
        == []
    )


def test_exactly_as_good_as_a_constant_is_refused_and_few_positives_are_not_judged() -> None:
    assert reasons(metrics=with_metrics(click_ne=1.0)) != []
    assert reasons(dataclasses.replace(SETTINGS, noise=2.0), metrics=with_metrics(click_ne=1.05)) == []
    assert reasons(metrics=with_metrics(click_ne=1.5, click_calibration=1.1), positives={"click": 3, "watch": 0}) == []


def test_an_unsettled_run_is_refused_by_default() -> None:
    (reason,) = reasons(status="unsettled", reason="unsettled: the loss of click jumped")
    assert "its status is unsettled" in reason
    assert reasons(dataclasses.replace(SETTINGS, statuses=["completed", "unsettled"]), status="unsettled") == []


def test_a_hold_out_of_two_rows_says_nothing_and_is_refused_unless_it_is_allowed() -> None:
    tiny = {"rows": {"click": 2, "watch": 2}, "positives": {"click": 1, "watch": 0}}
    (reason,) = reasons(metrics=with_metrics(watch_r2=-3.0), **tiny)
    assert reason == "hold-out: 0 of 2 tasks could be judged on its rows (click 2, watch 2); wanted: at least 1"
    open_gate = dataclasses.replace(SETTINGS, min_judged=0)
    verdict = judge(dataclasses.replace(GOOD, **tiny), open_gate)
    assert verdict.passed
    assert sum(check.passed is None for check in verdict.checks) == 5, "each is said to be not judged"


def test_an_undefined_loss_is_not_judged_and_that_is_said() -> None:
    verdict = judge(dataclasses.replace(GOOD, metrics=with_metrics(watch_r2=math.nan)), SETTINGS)
    (check,) = [check for check in verdict.checks if check.passed is None]
    assert (check.about, "undefined on the hold-out" in check.words) == ("watch loss", True)
    both = dataclasses.replace(SETTINGS, min_judged=2)
    assert "1 of 2 tasks" in judge(dataclasses.replace(GOOD, metrics=with_metrics(watch_r2=math.nan)), both).reasons[0]


def test_every_rule_that_can_be_relaxed_names_its_settings() -> None:
    names = {field.name for field in dataclasses.fields(GateSettings)}
    for check in judge(GOOD, SETTINGS).checks:
        assert set(check.settings) <= names
        assert bool(check.settings) == (check.rule != "finite")
