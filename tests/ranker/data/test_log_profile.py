"""inspect_data.py --html: what the page says of a log is what is in it, and a browser shows it."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest

from browser import Balanced, opened
from ranker.data.inspection import inspect_log
from ranker.data.log_profile import PERIODS, LogProfiler, drift
from ranker.data.parquet_log import ParquetLog
from ranker.reports import log_page

ROWS = 400
DAYS = dict.fromkeys(range(4), ROWS)


def changed(day, columns):
    """On the last day prices are ten times as high; ``price`` is null now and then; clicks grow by day."""
    r = np.random.default_rng(day)
    clicks = (r.random(ROWS) < 0.2 + 0.1 * day).astype(np.int8)
    price = r.lognormal(1, 1, ROWS) * (10 if day == 3 else 1)
    columns["click"] = pa.array(clicks)
    columns["price"] = pa.array(price, mask=r.random(ROWS) < 0.1 * (day == 2))
    columns["user"] = pa.array(r.integers(0, 50, ROWS))
    columns["slot"] = pa.array((clicks * 3 + 1).astype(np.int16))  # tells the click


@pytest.fixture
def log(write_log):
    return ParquetLog(str(write_log(DAYS, change=changed, row_group_size=200)), on_bad_rows="drop")


def profile_of(log):
    profiler = LogProfiler(log)
    findings = inspect_log(log, look=profiler.add)
    return profiler.profile(), findings


def test_label_rates_nulls_and_counts_are_those_of_all_rows(log):
    profile, findings = profile_of(log)
    assert (profile.rows, profile.days, list(profile.rows_P)) == (4 * ROWS, 1, [ROWS] * 4)
    rates = [entry.label_rates["click"] for entry in findings.files]
    np.testing.assert_allclose(profile.labels["click"], rates)
    price = next(one for one in profile.features if one.feature.name == "price")
    table = np.concatenate([log.read(0, profile.rows).dense_BF[:, 0].numpy()])
    assert len(table) == profile.rows
    assert price.nulls_P[2] == pytest.approx(0.1, abs=0.05)
    assert list(price.nulls_P[[0, 1, 3]]) == [0, 0, 0]
    user = next(one for one in profile.features if one.feature.name == "user")
    assert user.column.distinct.estimate == 50


def test_drift_and_leaks_are_found_and_quiet_features_are_not_accused(log):
    profile, _ = profile_of(log)
    by_name = {one.feature.name: one for one in profile.features}
    assert int(np.nanargmax(by_name["price"].drift_P)) == 3
    assert by_name["price"].drift_P[3] > 1
    assert np.nanmax(by_name["user"].drift_P) < 0.1
    assert by_name["slot"].aucs["click"] > 0.99
    assert by_name["user"].aucs["click"] < 0.7
    (line,) = log_page.lines(profile)
    assert line.startswith("feature 'price' is distributed otherwise on 2022-04-28")


def test_drift_of_equal_days_is_zero_on_average_whatever_the_number_of_bins():
    r = np.random.default_rng(0)
    for bins in (2, 11, 22):
        found = [np.nanmean(drift(r.integers(0, bins, 2000), np.repeat(np.arange(4), 500), 4)) for _ in range(10)]
        assert np.mean(found) < 0.012
    assert np.isnan(drift(np.zeros(150, dtype=np.int64), np.repeat([0, 1], [100, 50]), 2)).all()


def test_a_long_log_has_a_bounded_number_of_periods(write_log):
    profile, _ = profile_of(ParquetLog(str(write_log(dict.fromkeys(range(0, 100, 3), 5))), on_bad_rows="drop"))
    assert len(profile.starts) <= PERIODS
    assert profile.days == 4
    assert profile.rows_P.sum() == profile.rows


def test_the_command_writes_a_page_that_a_browser_shows_without_an_error(write_log, load_script, tmp_path, capsys):
    root = write_log(DAYS, change=changed, row_group_size=200)
    assert load_script("inspect_data").main([str(root), "--html"]) == 0
    assert f"page: {root / 'inspection.html'}" in capsys.readouterr().out
    page = (root / "inspection.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == []
    seen = opened(root / "inspection.html", tmp_path / "profile", script="document.querySelector('th button').click();")
    assert seen.console == []
    assert re.search(r'<b class="auc suspect">(0\.99\d|1\.000)</b>', seen.dom)
    assert "04-28" in seen.dom
    assert 'aria-sort="ascending"' in seen.dom


def test_a_page_needs_the_rows(write_log, load_script, capsys):
    with pytest.raises(SystemExit):
        load_script("inspect_data").main([str(write_log({0: 40, 1: 40})), "--html", "--quick"])
    assert "--html reads the rows" in capsys.readouterr().err
