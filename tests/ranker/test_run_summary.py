"""What the summary says of a run, on the console and in summary.json."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from ranker.run_summary import no_better_than_constant, show

SUMMARY: dict[str, Any] = {
    "status": "completed",
    "reason": "",
    "metrics": {"test/click/ne": 0.9, "test/watch/r2": 0.3},
    "bad_rows": 0,
    "steps": 10,
    "examples": 100,
    "examples_per_second": 5.0,
    "data_wait_fraction": 0.0,
}


def shown(**changed: Any) -> str:
    text = io.StringIO()
    show(SUMMARY | changed, Console(file=text, width=200))
    return text.getvalue()


@pytest.mark.parametrize(
    ("metrics", "tasks"),
    [
        ({"test/click/ne": 0.99, "test/watch/r2": 0.01}, []),
        ({"test/click/ne": 1.0, "test/watch/r2": 0.5}, ["click"]),
        ({"test/click/ne": 0.9, "test/watch/r2": 0.0}, ["watch"]),
        ({"test/click/ne": math.nan, "test/watch/r2": None}, []),
        ({"test/click/ne": 0.998, "test/click/auc": 0.505, "test/watch/r2": 0.5}, ["click"]),
        ({"test/click/ne": 0.98, "test/click/auc": 0.53}, []),
    ],
)
def test_tasks_no_better_than_a_constant_are_named(metrics: dict[str, float | None], tasks: list[str]) -> None:
    assert no_better_than_constant(metrics) == tasks
    said = "no better than a constant prediction on the hold-out: " + ", ".join(tasks)
    assert (said in shown(metrics=metrics)) == bool(tasks)


def test_an_unsettled_run_says_so_on_its_status_line() -> None:
    assert "completed: unsettled: the loss jumped" in shown(reason="unsettled: the loss jumped")


def test_a_speed_that_was_not_measured_is_not_shown() -> None:
    assert "10 steps, 100 examples, 5 examples/s, 0.0 % waiting for data" in shown()
    assert "examples/s" not in shown(examples_per_second=0.0)
    assert "0.25 examples/s" in shown(examples_per_second=0.25)
    assert "12,345 examples/s" in shown(examples_per_second=12345.4)
