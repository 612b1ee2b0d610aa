"""The drift guard says what is far from the past, and nothing of a day like the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from daily_log import DAY_MS, FIRST_DAY, name_of, write_day, write_log
from ranker.daily.day_statistics import DayStatistics
from ranker.daily.drift import Drift, compare, population_stability
from ranker.daily.settings import DriftSettings
from ranker.data.parquet_log import ParquetLog
from ranker.data.synthetic import SyntheticLog
from ranker.data.synthetic_world import Difficulty

SETTINGS = DriftSettings(days=7, min_days=2, sample_rows=200_000, scale=4.0, nulls=0.2, label=2.0, new_ids=0.3, psi=1.0)
Change = Callable[[pl.DataFrame], pl.DataFrame]


def of_day(log: ParquetLog, day: int) -> DayStatistics:
    start = (FIRST_DAY + day) * DAY_MS
    files = {f"day={name_of(day)}.parquet": ""}
    first, stop = log.row_at_time(start), log.row_at_time(start + DAY_MS)
    return DayStatistics.of(log, first, stop, sample_rows=10_000, files=files)


def drift_of(root: Path, change: Change) -> Drift:
    """Days 0 to 3 as they are and day 4 changed; compares day 4."""
    write_log(root, 4)
    write_day(root, 4, change)
    write_day(root, 5)
    log = ParquetLog(str(root))
    days = [of_day(log, day) for day in range(5)]
    shares = [compare(days[k], days[:k], [], log.schema, SETTINGS).new_ids for k in range(1, 4)]
    return compare(days[4], days[:4], shares, log.schema, SETTINGS)


def half_a_day(column: str, factor: float) -> Change:
    late = (pl.col("ts") % DAY_MS) >= DAY_MS // 2
    return lambda rows: rows.with_columns(pl.when(late).then(pl.col(column) * factor).otherwise(pl.col(column)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.with_columns(pl.col("price") * 1000), ["'price'", "larger", "seconds to milliseconds"]),
        (lambda rows: rows.with_columns(pl.col("age") * 1000), ["'age'", "larger", "seconds to milliseconds"]),
        (lambda rows: rows.with_columns(pl.col("age") / 60), ["'age'", "smaller", "minutes to seconds"]),
        (half_a_day("age", 10.0), ["'age'", "larger", "in a quarter of the day"]),
        (lambda rows: rows.with_columns(pl.col("price") * 0), ["'price'", "0 or null"]),
        (lambda rows: rows.with_columns(pl.col("price") * 0.2 + 0.4), ["'price'", "distribution changed"]),
        (lambda rows: rows.with_columns(pl.col("click") * 0), ["'click'", "rate of positives is 0"]),
        (lambda rows: rows.with_columns(pl.col("watch") * 30), ["'watch'", "mean label"]),
        (lambda rows: rows.with_columns(pl.lit(None, pl.Int8).alias("click")), ["'click'", "no label"]),
    ],
    ids=["x1000", "x1000 below log1p", "/60", "a jump", "zeros", "another shape", "no click", "regression", "no label"],
)
def test_what_is_far_outside_is_said(tmp_path: Path, change: Change, said: Sequence[str]) -> None:
    alarms = drift_of(tmp_path, change).alarms
    assert len(alarms) == 1
    assert all(word in alarms[0] for word in said), alarms[0]


def test_an_ordinary_day_is_not_far(tmp_path: Path) -> None:
    drift = drift_of(tmp_path, lambda rows: rows)
    assert drift.alarms == []
    assert 0 <= max(drift.psi.values()) < 0.25
    assert drift.new_ids == {"user": 0.0, "shop": 0.0}


def test_new_ids_and_nulls(tmp_path: Path) -> None:
    root = tmp_path
    (root / "schema.yaml").write_text("")
    write_log(root, 0)
    schema = (root / "schema.yaml").read_text().replace("num_embeddings: 100", "num_embeddings: 300")
    (root / "schema.yaml").write_text(schema.replace("{name: price}", "{name: price, fill_null: 0.5}"))
    empty = pl.when(pl.int_range(pl.len()) % 2 == 0).then(None).otherwise(pl.col("price")).alias("price")
    for day in range(5):
        write_day(root, day, lambda rows, day=day: rows.with_columns(pl.col("user") + 150, empty) if day == 3 else rows)
    log = ParquetLog(str(root))
    days = [of_day(log, day) for day in range(4)]
    shares = [compare(days[k], days[:k], [], log.schema, SETTINGS).new_ids for k in (1, 2)]
    alarms = compare(days[3], days[:3], shares, log.schema, SETTINGS).alarms
    assert [alarm.split(":")[0] for alarm in alarms] == ["dense feature 'price'", "feature 'user'"]
    assert "50.0% are null" in alarms[0]


def test_the_jumps_of_the_stream_are_caught_and_its_quiet_days_are_not() -> None:
    def alarms_of(difficulty: Difficulty, seed: int) -> list[str]:
        rows = 8192
        log = SyntheticLog(
            seed=seed,
            train_rows=6 * rows,
            rows_per_day=rows,
            eval_rows=10,
            num_users=500,
            num_items=200,
            difficulty=difficulty,
        )
        days = [DayStatistics.of(log, k * rows, (k + 1) * rows, sample_rows=rows, files={}) for k in range(6)]
        shares = [compare(days[k], days[:k], [], log.schema, SETTINGS).new_ids for k in range(1, 5)]
        return list(compare(days[5], days[:5], shares, log.schema, SETTINGS).alarms)

    assert alarms_of(Difficulty(jump=0), 0) == []
    # A twentieth of all quarter days of 20 signals: about four signals jump in a day.
    jumped = alarms_of(Difficulty(jump=10.0, jump_share=0.05, quiet_days=5.0), 0)
    assert jumped
    assert all("dense feature 'signal_" in alarm and "in a quarter of the day" in alarm for alarm in jumped)


def test_statistics_survive_their_files_and_damage_is_noticed(tmp_path: Path) -> None:
    log = ParquetLog(str(write_log(tmp_path / "log", 2)))
    made = of_day(log, 0)
    made.save(tmp_path / "kept", "d")
    read: Any = DayStatistics.read(tmp_path / "kept", "d")
    assert (read.rows, read.dense, read.labels, read.files) == (made.rows, made.dense, made.labels, made.files)
    assert all(np.array_equal(read.seen[name], made.seen[name]) for name in made.seen)
    assert all(np.array_equal(read.ids[name][1], made.ids[name][1]) for name in made.ids)
    (tmp_path / "kept" / "d.npz").write_bytes(b"half")
    assert DayStatistics.read(tmp_path / "kept", "d") is None


def test_population_stability_against_numbers_computed_by_hand(tmp_path: Path) -> None:
    log = ParquetLog(str(write_log(tmp_path, 2)))
    day = of_day(log, 0).dense["price"]
    assert population_stability([day], day) == pytest.approx(0, abs=1e-9)
    # All values in the lowest bin: shares of 1 and nine times 0.005, scaled to a sum of 1.
    low = type(day)(scales=[1.0], quantiles=[min(day.quantiles)] * 101, nulls=None)
    p = np.array([1.0] + [0.005] * 9) / 1.045
    below = [np.searchsorted(day.quantiles, edge, side="right") / 101 for edge in day.quantiles[10:100:10]]
    q = np.diff([0.0, *below, 1.0])
    assert population_stability([day], low) == pytest.approx(float(((p - q) * np.log(p / q)).sum()))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a day where its training would begin: whether it was begun is all that counts."""
    import ranker.daily.cycle as cycle

    def given_up(*_: Any, **__: Any) -> Any:
        raise cycle.JobFailedError("far enough", by_user=False)

    monkeypatch.setattr(cycle, "attempt", given_up)


@pytest.mark.usefixtures("no_training")
def test_stop_does_not_train_and_warn_does(
    call: Callable[..., int], jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "log", 3)
    write_day(log, 3, lambda rows: rows.with_columns(pl.col("age") * 1000))
    write_day(log, 4)
    words = ("daily.bootstrap_days=4", "daily.on_drift=stop")
    assert call(*words) == 1
    said = capsys.readouterr()
    assert "seconds to milliseconds" in said.out
    assert f"{name_of(3)} is far from the past and was not trained on" in said.err
    assert not (tmp_path / "daily" / "runs" / name_of(3)).exists()
    assert "Waiting:" in (tmp_path / "daily" / "index.html").read_text()
    assert call("daily.bootstrap_days=4") == 1
    assert "far enough" in capsys.readouterr().err
    assert (tmp_path / "daily" / "runs" / name_of(3) / "plan.json").is_file()
    write_day(log, 3)  # mended
    assert call(*words) == 1
    assert "drift:" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_training")
def test_a_day_is_looked_at_again_by_another_schema(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "log", 3)
    write_day(log, 3, lambda rows: rows.with_columns(pl.col("age") * 1000))
    write_day(log, 4)
    words = ("daily.bootstrap_days=4", "daily.on_drift=stop")
    assert call(*words, "data.drop_features=[price]") == 1
    assert "seconds to milliseconds" in capsys.readouterr().out
    assert call(*words, "data.drop_features=[age]") == 1
    said = capsys.readouterr()
    assert "drift:" not in said.out
    assert "far enough" in said.err
