"""Which days a log lacks around a day that is trained on, and when a day is complete."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any, cast

import polars as pl
import pytest
import yaml

from daily_log import rows_of, write_day, write_log
from ranker.daily.complete import Completeness
from ranker.daily.days import LogDays
from ranker.daily.settings import DailySettings
from ranker.data.parquet_index import open_index
from ranker.errors import UserError
from ranker.installation import conf_folder

LOG = LogDays(index=cast(Any, None), files={f"2026-03-{day:02}": {} for day in (1, 3, 4, 8)})


@pytest.mark.parametrize(
    ("day", "since", "gap"),
    [
        ("2026-03-01", [], "2026-03-02"),
        ("2026-03-03", ["2026-03-01"], "2026-03-02"),
        ("2026-03-03", ["2026-03-02"], ""),
        ("2026-03-04", ["2026-03-01"], "2026-03-02 to 2026-03-03 and 2026-03-05 to 2026-03-07"),
    ],
)
def test_days_without_rows_are_named(day: str, since: list[str], gap: str) -> None:
    assert LOG.missing_around(day, since=since) == gap


def test_a_day_without_rows_inside_a_row_group_is_no_day(tmp_path: Path) -> None:
    write_log(tmp_path, 0)
    pl.concat([rows_of(day) for day in (0, 1, 3, 4)]).write_parquet(tmp_path / "week.parquet")
    names = LogDays.of(open_index(str(tmp_path))).names
    assert names == ["2023-11-14", "2023-11-15", "2023-11-17", "2023-11-18"]


def test_a_day_is_complete_a_while_after_its_end(tmp_path: Path) -> None:
    log = LogDays.of(open_index(str(write_log(tmp_path, 2))))
    settings = DailySettings.of(options(complete="delay", delay_hours=1.5))
    for now, lacking in (
        ("2023-11-15T01:29:59", "2023-11-14: counts as complete at 2023-11-15T01:30+00:00 (daily.delay_hours)"),
        ("2023-11-15T01:30:00", "2023-11-15: counts as complete at 2023-11-16T01:30+00:00 (daily.delay_hours)"),
        ("2023-11-16T01:30:00", ""),
    ):
        at = dt.datetime.fromisoformat(now).replace(tzinfo=dt.UTC)
        complete = Completeness(settings=settings, log=log, now=lambda at=at: at)  # type: ignore[misc]
        assert complete.lacking("2023-11-14", "2023-11-15") == lacking


def test_each_folder_of_a_day_needs_its_marker(tmp_path: Path) -> None:
    write_log(tmp_path, 0)
    write_day(tmp_path, 0, lambda rows: rows.head(300), name="day=2023-11-14/hour=0/a.parquet")
    write_day(tmp_path, 0, lambda rows: rows.tail(300), name="day=2023-11-14/hour=12/a.parquet")
    write_day(tmp_path, 1, name="flat.parquet")
    complete = Completeness(
        settings=DailySettings.of(options(complete="marker")), log=LogDays.of(open_index(str(tmp_path)))
    )
    assert complete.lacking("2023-11-14") == "2023-11-14: no day=2023-11-14/hour=0/_SUCCESS yet"
    (tmp_path / "day=2023-11-14" / "hour=0" / "_SUCCESS").touch()
    assert complete.lacking("2023-11-14") == "2023-11-14: no day=2023-11-14/hour=12/_SUCCESS yet"
    (tmp_path / "day=2023-11-14" / "hour=12" / "_SUCCESS").touch()
    assert complete.lacking("2023-11-14", "2023-11-15") == "2023-11-15: no _SUCCESS_2023-11-15 yet"
    (tmp_path / "_SUCCESS_2023-11-15").touch()
    assert complete.lacking("2023-11-14", "2023-11-15") == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"complete": "later"}, "daily.complete"),
        ({"marker": "a/b"}, "is the name of a file"),
        ({"delay_hours": -1.0}, "delay_hours must be 0 or more"),
    ],
)
def test_wrong_options_are_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DailySettings.of(options(**given))


def options(**changes: Any) -> dict[str, Any]:
    """The options of conf/daily, with changes."""
    return yaml.safe_load((conf_folder() / "daily" / "default.yaml").read_text()) | changes
