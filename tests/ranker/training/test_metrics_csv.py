from __future__ import annotations

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from ranker.training import metrics_csv
from ranker.training.metrics_csv import MetricsCsv


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_one_step_share_a_row_and_late_columns_are_added(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 1.5}, step=10)
    log.log_metrics({"auc": 0.6}, step=20)
    log.log_metrics({"lr": 0.1}, step=10)
    log.save()

    assert rows(log.path) == [
        {"step": "10", "loss": "1.5", "auc": "", "lr": "0.1"},
        {"step": "20", "loss": "", "auc": "0.6", "lr": ""},
    ]


def test_a_resumed_file_keeps_the_past_and_drops_what_will_come_again(tmp_path: Path) -> None:
    first = MetricsCsv(tmp_path / "metrics.csv")
    for step in (10, 20, 30):
        first.log_metrics({"loss": float(step)}, step=step)
    first.save()

    second = MetricsCsv(first.path)
    second.resume(20)
    second.log_metrics({"loss": -30.0}, step=30)
    second.save()

    assert [(r["step"], float(r["loss"])) for r in rows(second.path)] == [("10", 10.0), ("20", 20.0), ("30", -30.0)]


def test_resuming_without_a_file_starts_an_empty_one(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.resume(20)
    log.finalize("success")

    assert rows(log.path) == []


def test_a_file_that_is_slow_to_write_is_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()  # every look at the clock a second later, so that writing seems to take one
    monkeypatch.setattr(metrics_csv, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    log = MetricsCsv(tmp_path / "metrics.csv")
    seen = []
    for step in range(500):
        log.log_metrics({f"column_{step}": 1.0}, step=step)
        if log.path.is_file():
            seen.append(log.path.stat().st_mtime_ns)

    assert 3 <= len(set(seen)) <= 6, "once after 5 seconds, then every hundred"
    last = rows(log.path)
    assert len(last[0]) == len(last) + 1 > 300, "each row came with a column of its own"
