"""The line and the warnings before the first step, and logs that a run refuses to begin with."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from ranker.data.datamodule import RankingDataModule
from ranker.data.parquet_log import ParquetLog
from ranker.data.start_report import start_report
from ranker.errors import UserError

DAYS = {0: 300, 1: 300, 2: 250}
OPTIONS = ["data.hold_out", "train.epochs"]


def reported(root, *, options=OPTIONS, limited=False, **log):
    data = RankingDataModule(ParquetLog(str(root), **log), batch_size=4, window=400, num_workers=0)
    steps = 3 if limited else data.num_batches
    return start_report(
        data, parameters={"dense": 1234, "embedding": 56}, steps=steps, limited=limited, options=options
    )


def test_a_run_that_ends_within_its_warm_up_is_told_so(write_log):
    data = RankingDataModule(ParquetLog(str(write_log(DAYS))), batch_size=4, window=64, num_workers=0)
    told = [start_report(data, parameters={}, steps=steps, limited=True, warmup=100).warnings for steps in (60, 101)]
    assert [any("ends at 60% of its full value" in line for line in lines) for lines in told] == [True, False]


def test_the_line_says_rows_days_hold_out_labels_parameters_and_steps(write_log):
    report = reported(write_log(DAYS))
    assert report.line == (
        "600 training rows in 2 days from 2022-04-25 00:00:00, hold-out 250 rows from 2022-04-27 00:00:00; labels of "
        "the first 400 rows: click 50.00%, watch mean 4.008; parameters: 1,234 dense, 56 embedding; 150 steps to come"
    )
    assert report.warnings == ["150 steps are few: use a smaller scale.batch_size or more passes (train.epochs)"]


def test_steps_that_the_user_limited_are_not_called_few(write_log):
    report = reported(write_log(DAYS), limited=True)
    assert report.line.endswith("3 steps to come")
    assert report.warnings == []


def test_a_small_hold_out_is_warned_about(write_log):
    root = write_log({0: 900, 1: 2})
    (warning,) = reported(root).warnings
    assert warning == (
        "the hold-out has 2 rows, so its metrics say little; hold out more, for example with data.hold_out=0.1, "
        "a tenth of the rows"
    )
    assert reported(root, options=()).warnings == ["the hold-out has 2 rows, so its metrics say little; hold out more"]


def nulls(*names, until=10):
    def change(day, columns):
        for name in names:
            if day < until:
                columns[name] = pa.nulls(len(columns[name]), columns[name].type)

    return change


def test_a_task_without_labels_is_named(write_log):
    report = reported(write_log({0: 900, 1: 300}, change=nulls("click")))
    assert report.warnings == [
        "task 'click' has no label in the first 400 training rows (column 'click')",
        "task 'click' has no label in the first 300 hold-out rows (column 'click')",
    ]
    assert "click none, watch mean" in report.line


def test_a_log_without_any_training_label_is_refused(write_log):
    root = write_log(DAYS, change=nulls("click", "watch", until=2))
    with pytest.raises(
        UserError, match="none of the 600 training rows has a label: the columns 'click', 'watch' are null"
    ):
        reported(root)


def test_labels_may_begin_late(write_log):
    report = reported(write_log({0: 450, 1: 450, 2: 250}, change=nulls("click", "watch", until=1)))
    assert len(report.warnings) == 2
    assert all("in the first 400 training rows" in warning for warning in report.warnings)


def test_a_log_of_rows_that_are_all_dropped_is_refused(write_log):
    def change(day, columns):
        columns["price"] = pa.array(np.full(len(columns["price"]), np.nan))

    with pytest.raises(UserError, match=r"none of the 600 training rows has a label \(600 rows cannot be used\)"):
        reported(write_log(DAYS, change=change), on_bad_rows="drop")


def test_a_label_among_the_features_is_warned_about_by_column_and_by_value(write_log, log_schema):
    features = tuple(dataclasses.replace(f, column="click") if f.name == "slot" else f for f in log_schema.categorical)
    schema = dataclasses.replace(log_schema, categorical=features)

    def change(day, columns):
        columns["price"] = columns["click"].cast(pa.float64())

    by_column, by_value, by_id, _ = reported(write_log(DAYS, schema=schema, change=change)).warnings
    assert "column 'click' is the label of task 'click' and feature 'slot', so the model reads the answer" in by_column
    assert "feature 'price' alone predicts task 'click' (AUC 1.000)" in by_value
    assert "feature 'slot' alone predicts task 'click' (AUC 1.000)" in by_id
