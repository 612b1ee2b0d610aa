from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest

from ranker.errors import UserError
from ranker.training import metrics_csv
from ranker.training.metrics_csv import OPEN_ROWS, MetricsCsv


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def filled(path: Path, steps: range) -> MetricsCsv:
    log = MetricsCsv(path / "metrics.csv")
    for step in steps:
        log.log_metrics({"loss": float(step)}, step=step)
    log.save()
    return log


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


@pytest.mark.parametrize("flush_every", [1, 7, 1000])
def test_the_file_is_the_same_whenever_it_is_flushed(tmp_path: Path, flush_every: int) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    expected: dict[int, dict[str, str]] = {}

    def record(step: int, name: str, value: float) -> None:
        log.log_metrics({name: value}, step=step)
        expected.setdefault(step, {"step": str(step)})[name] = str(value)

    for step in range(300):
        record(step, "loss", step / 7)
        if step % flush_every == 0:
            log.save()
        if step % 50 == 0:
            record(step, "val", 1 / (step + 1))  # after the row was written
        if step == 200:
            record(step, "sharpness", 3.0)  # a new column, when most rows are no longer in memory
            record(step - 150, "late", 4.0)  # a value for one of those
            record(-1, "loss", 5.0)  # a row before all others
    log.finalize("success")

    found = [{name: value for name, value in row.items() if value} for row in rows(log.path)]
    assert found == [expected[step] for step in sorted(expected)]
    assert list(rows(log.path)[0]) == ["step", "loss", "val", "sharpness", "late"]


def test_rows_are_appended_and_only_the_newest_stay_in_memory(tmp_path: Path) -> None:
    log = filled(tmp_path, range(1000))
    before = log.path.stat()
    for step in range(1000, 3000):
        log.log_metrics({"loss": float(step)}, step=step)
        if step % 10 == 9:
            log.save()

    assert log.path.stat().st_ino == before.st_ino, "appended to, not replaced"
    assert [int(row["step"]) for row in rows(log.path)] == list(range(3000))
    assert len(log._rows) == OPEN_ROWS


def test_a_line_that_was_cut_off_is_dropped_on_resume(tmp_path: Path) -> None:
    log = filled(tmp_path, range(5))
    with log.path.open("ab") as file:
        file.write(b"5,5")  # of "5,5.0": a number, but not the one that was logged

    second = MetricsCsv(log.path)
    second.resume(5)
    second.log_metrics({"loss": 6.0}, step=6)
    second.save()

    assert [(r["step"], r["loss"]) for r in rows(log.path)][4:] == [("4", "4.0"), ("6", "6.0")]


def test_bytes_of_a_failed_append_do_not_stay_in_the_file(tmp_path: Path) -> None:
    log = filled(tmp_path, range(5))
    with log.path.open("ab") as file:
        file.write(b"5,")  # as a full disk leaves it
    log.log_metrics({"loss": 5.0}, step=5)
    log.save()

    assert [int(row["step"]) for row in rows(log.path)] == list(range(6))
    assert rows(log.path)[5]["loss"] == "5.0"


def test_a_resumed_file_keeps_the_past_and_drops_what_will_come_again(tmp_path: Path) -> None:
    first = filled(tmp_path, range(0, 3 * OPEN_ROWS))
    step = 2 * OPEN_ROWS

    second = MetricsCsv(first.path)
    second.resume(step)
    assert [int(row["step"]) for row in rows(first.path)] == list(range(step + 1))
    second.log_metrics({"val": 0.5}, step=step)
    second.log_metrics({"loss": -1.0}, step=step + 1)
    second.save()

    *_, at, after = rows(second.path)
    assert (at["step"], at["loss"], at["val"]) == (str(step), str(float(step)), "0.5")
    assert (after["step"], after["loss"]) == (str(step + 1), "-1.0")


def test_resuming_without_a_file_starts_an_empty_one(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.resume(20)
    log.finalize("success")

    assert rows(log.path) == []


def test_the_file_is_flushed_between_steps_and_then_only_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()  # a second passes at every look at the clock
    monkeypatch.setattr(metrics_csv, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    log = MetricsCsv(tmp_path / "metrics.csv")
    files, lengths = [], []
    for step in range(300):
        log.log_metrics({"loss": 1.0}, step=step)
        log.log_metrics({"sigma": 0.5}, step=step)
        if log.path.is_file():
            files.append(log.path.stat().st_ino)
            lengths.append(len(rows(log.path)))
            assert all(row["sigma"] for row in rows(log.path)), "no row is written half"

    assert len(set(files)) == 1
    assert lengths == sorted(lengths)
    assert 50 < len(set(lengths)) < 150, "about every five seconds"


def test_a_value_that_becomes_shorter_leaves_nothing_of_the_longer_one(tmp_path: Path) -> None:
    log = filled(tmp_path, range(3))
    log.log_metrics({"loss": 0.123456789}, step=2)
    log.save()
    log.log_metrics({"loss": 1}, step=2)
    log.save()

    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", "0,0.0", "1,1.0", "2,1"]


def test_a_full_disk_is_one_line_and_loses_no_row(
    tmp_path: Path, disk_full_after: Callable[[int], AbstractContextManager[None]], capsys: pytest.CaptureFixture[str]
) -> None:
    log = filled(tmp_path, range(5))
    log.log_metrics({"loss": 0.123456789}, step=5)
    with disk_full_after(log.path.stat().st_size + 3):
        with pytest.raises(UserError, match=r"metrics.csv cannot be written: .*; free space, then resume the run"):
            log.save()
        log.finalize("failed")
    assert "metrics.csv cannot be written" in capsys.readouterr().err
    assert [int(row["step"]) for row in rows(log.path)][:5] == list(range(5))

    log.save()

    assert [int(row["step"]) for row in rows(log.path)] == list(range(6))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_file_that_nothing_was_logged_to_stays_as_it_is(tmp_path: Path) -> None:
    before = filled(tmp_path, range(5)).path.read_bytes()

    MetricsCsv(tmp_path / "metrics.csv").finalize("failed")  # of a run that was refused before it began

    assert (tmp_path / "metrics.csv").read_bytes() == before
