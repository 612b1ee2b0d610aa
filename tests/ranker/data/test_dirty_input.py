from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ranker.data.datamodule import RankingDataModule
from ranker.data.loader import WindowedLoader
from ranker.data.log import Selected
from ranker.data.parquet_log import ParquetLog
from ranker.data.schema import Task
from ranker.data.windows import plan_windows
from ranker.errors import UserError

DAYS = {0: 25, 1: 25, 2: 25}
SECOND_DAY = "day=2022-04-26.parquet"


def on_day(day, **columns):
    """Replaces columns of one day's file; a function gets the old column."""

    def change(this_day, old):
        if this_day != day:
            return
        for name, new in columns.items():
            old[name] = new(old[name]) if callable(new) else new

    return change


def with_value(row, value, kind=None):
    def change(column):
        values = column.to_pylist()
        values[row] = value
        return pa.array(values, kind or column.type)

    return change


def read_all(root, **options):
    log = ParquetLog(str(root), **options)
    return log, log.read(0, log.num_rows)


def refused(root, *parts, **options):
    with pytest.raises(UserError) as caught:
        read_all(root, **options)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    return message


def test_a_missing_column_is_named_with_the_nearest(write_log):
    def change(day, columns):
        if day == 1:
            columns["clik"] = columns.pop("click")

    refused(write_log(DAYS, change=change), f"{SECOND_DAY}: column 'click'", "is missing", "did you mean 'clik'")


@pytest.mark.parametrize(
    ("column", "values", "wanted"),
    [
        ("price", ["cheap"] * 25, "dense feature 'price' is a number"),
        ("t", [True] * 25, "a time is a number, a timestamp, a date or an ISO string"),
        ("t", np.full(25, 1e9, np.float32), "its digits do not suffice for a time, write it as int64 or float64"),
        ("id", ["x"] * 25, "a row id is an integer"),
        ("user", [1.5] * 25, "ids of 'user' are integers or strings"),
        ("slot", ["x"] * 25, "strings of 'slot' need hash_buckets or a vocabulary"),
        ("country", [1] * 25, "the vocabulary of 'country' has another type"),
        ("slot", [[1]] * 25, "one_hot feature 'slot' has one id per row"),
        ("tags", [1] * 25, "multi_hot feature 'tags' has a list of ids per row"),
        ("tags", [["x"]] * 25, "strings of 'tags' need hash_buckets or a vocabulary"),
        ("click", ["yes"] * 25, "the label of task 'click' is a number"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused_before_reading(write_log, column, values, wanted):
    root = write_log(DAYS, change=on_day(1, **{column: pa.array(values)}))
    with pytest.raises(UserError, match=f"{SECOND_DAY}: column '{column}' is .*; {wanted}"):
        ParquetLog(str(root))


def test_a_mask_of_the_wrong_type_is_refused(write_log, log_schema):
    schema = dataclasses.replace(log_schema, tasks=(Task(name="click", mask="country"),))
    with pytest.raises(UserError, match="column 'country' is string; the mask of task 'click' is a boolean"):
        ParquetLog(str(write_log(DAYS)), schema=schema)


def test_ids_that_are_strings_in_one_file_and_integers_in_another_are_refused(write_log):
    root = write_log(DAYS, change=on_day(1, user=lambda column: column.cast(pa.string())))
    refused(root, SECOND_DAY, "ids in column 'user' are strings, but integers in day=2022-04-25.parquet", "one type")


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("price", None, "null in 1 rows, first in row 3; give dense feature 'price' a fill_null"),
        ("price", float("nan"), "NaN or infinity in 1 rows, first in row 3; clean the column"),
        ("price", float("inf"), "NaN or infinity in 1 rows"),
        ("price", 1e300, "NaN or infinity in 1 rows"),
        ("slot", -1, "id below 0 (-1) in 1 rows, first in row 3; ids of 'slot' are 0 .. 6"),
        ("slot", 7, "id out of range (7) in 1 rows, first in row 3; ids of 'slot' are 0 .. 6"),
        ("tags", [0, 4], "id out of range (4) in 1 rows, first in row 3"),
        ("tags", [-2], "id below 0 (-2) in 1 rows, first in row 3"),
        ("click", 3, "label neither 0 nor 1 (3) in 1 rows, first in row 3"),
        ("id", None, "null in 1 rows, first in row 3; give every row an id"),
    ],
)
def test_a_bad_value_names_file_column_row_group_and_row(write_log, column, value, reason):
    root = write_log(DAYS, change=on_day(1, **{column: with_value(13, value)}))
    message = refused(root, f"{SECOND_DAY}, column '{column}', row group 1: {reason}")
    assert message.endswith("or set on_bad_rows to drop or quarantine")


def test_an_infinite_label_is_refused_and_a_null_one_is_not_observed(write_log):
    def change(day, columns):
        values = columns["watch"].cast(pa.float64()).to_pylist()
        values[12:14] = [None, float("inf") if day == 1 else 1.0]
        columns["watch"] = pa.array(values)

    root = write_log(DAYS, change=change)
    refused(root, f"{SECOND_DAY}, column 'watch', row group 1: label NaN or infinity in 1 rows, first in row 3")
    _, batch = read_all(root, on_bad_rows="drop")
    assert batch.mask_BT[:, 1].logical_not().nonzero()[:, 0].tolist() == [12, 37, 38, 62]


def test_bad_values_in_unobserved_labels_do_no_harm(write_log, log_schema):
    schema = dataclasses.replace(log_schema, tasks=(Task(name="click", mask="seen"),))

    def change(day, columns):
        columns["seen"] = pa.array([i != 3 for i in range(25)])
        columns["click"] = with_value(3, 9)(columns["click"])

    log, batch = read_all(write_log(DAYS, schema=schema, change=change))
    assert log.num_bad_rows == 0
    assert batch.mask_BT[:, 0].sum() == 72


def test_a_null_time_is_refused_under_every_policy(write_log):
    root = write_log(DAYS, change=on_day(1, t=with_value(13, None)))
    refused(root, SECOND_DAY, "column 't', row group 1", "1 rows have no time", on_bad_rows="drop")


def test_a_row_earlier_than_the_one_before_is_named(write_log):
    root = write_log(DAYS, change=on_day(1, t=lambda c: pa.array(c.to_numpy()[[*range(12), 13, 12, *range(14, 25)]])))
    refused(root, SECOND_DAY, "column 't', row group 1: row 3 is earlier than the row before it; sort the log by 't'")


def test_files_whose_times_overlap_are_refused_on_opening(write_log):
    root = write_log(DAYS, change=on_day(1, t=lambda column: pa.array(column.to_numpy() + 3_600_000)))
    begins = "04-27.parquet, column 't', row group 0: begins before row group 2 of day=2022-04-26"
    with pytest.raises(UserError, match=begins):
        ParquetLog(str(root))


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "s"), (1e3, "us"), (1e6, "ns")])
def test_a_time_in_another_unit_is_recognised(write_log, factor, unit):
    def change(day, columns):
        columns["t"] = pa.array((columns["t"].to_numpy() * factor).astype(np.int64))

    refused(write_log(DAYS, change=change), "column 't'", "is not in 1990 .. 2100 in 'ms'", f"set time_unit: {unit}")


def test_small_made_up_times_are_accepted(write_log):
    def change(day, columns):
        columns["t"] = pa.array(np.arange(25) + day * 86_400_000)

    log, _ = read_all(write_log(DAYS, change=change))
    assert log.train_rows == 50


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, -10])
def test_a_truncated_or_empty_file_is_named(write_log, keep):
    root = write_log(DAYS)
    path = root / SECOND_DAY
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(root, SECOND_DAY, "is not a Parquet file, or is truncated", "write it again")


def test_a_corrupt_page_is_named_with_its_row_group(write_log):
    root = write_log(DAYS)
    path = root / SECOND_DAY
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(4).data_page_offset
    data[start : start + 40] = bytes(40)
    path.write_bytes(bytes(data))
    column = pq.read_schema(path).names[4]
    refused(root, f"{SECOND_DAY}, column '{column}', row group 1: reading failed", "if it is broken, write it again")


def test_a_directory_without_rows_files_or_schema_is_refused(write_log, tmp_path):
    root = write_log({0: 0, 1: 0})
    refused(root, "2 Parquet files without a row")
    for path in root.glob("*.parquet"):
        path.unlink()
    refused(root, "no Parquet files in")
    (root / "schema.yaml").unlink()
    refused(root, "no schema.yaml in")
    refused(tmp_path / "nowhere", "no schema.yaml in")


def test_a_file_that_is_not_what_the_manifest_says_is_refused(write_log):
    root = write_log(DAYS, manifest=True)
    (root / SECOND_DAY).rename(root / "other.parquet")
    refused(root, SECOND_DAY, "is in the manifest but missing")
    (root / "other.parquet").rename(root / SECOND_DAY)
    pq.write_table(pq.read_table(root / SECOND_DAY).slice(3), root / SECOND_DAY)
    refused(root, SECOND_DAY, "has 22 rows where the manifest says 25")
    (root / "manifest.json").write_text('{"format": 1, "files": []}')
    refused(root, "is not in the manifest")


def test_an_unknown_policy_is_refused(write_log):
    with pytest.raises(UserError, match="on_bad_rows 'dorp' is unknown; did you mean 'drop'"):
        ParquetLog(str(write_log(DAYS)), on_bad_rows="dorp")


def dirty(day, columns):
    if day == 1:
        columns["price"] = with_value(13, float("nan"))(columns["price"])
        columns["slot"] = with_value(24, 99)(with_value(13, -5)(columns["slot"]))
        columns["tags"] = with_value(0, [1, 77, 2])(columns["tags"])


BAD = [25, 38, 49]


def test_dropped_rows_count_for_nothing_and_move_nobody(write_log):
    _, clean = read_all(write_log(DAYS, name="clean"))
    log, batch = read_all(write_log(DAYS, change=dirty), on_bad_rows="drop")
    assert log.num_bad_rows == 3
    assert log.bad_rows == {(SECOND_DAY, 0): 1, (SECOND_DAY, 1): 1, (SECOND_DAY, 2): 1}
    assert torch.equal(batch.row_B, clean.row_B)
    good = torch.tensor([row for row in range(75) if row not in BAD])
    for name in ("dense_BF", "onehot_BC", "labels_BT", "mask_BT", "time_ms_B"):
        assert torch.equal(getattr(batch.take(good), name), getattr(clean.take(good), name))
    assert torch.equal(batch.take(good).ragged["tags"].values, clean.take(good).ragged["tags"].values)
    dropped = batch.take(torch.tensor(BAD))
    assert not dropped.mask_BT.any()
    assert not dropped.dense_BF.any()
    assert not dropped.onehot_BC.any()
    assert dropped.ragged["tags"].offsets.tolist() == [0, 0, 0, 0]


def test_dropping_is_counted_once_however_often_a_row_is_read(write_log):
    log = ParquetLog(str(write_log(DAYS, change=dirty)), on_bad_rows="drop")
    for start in (0, 25, 0, 40, 0, 25):
        log.read(start, start + 20)
    assert log.num_bad_rows == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_dropped_rows_resumes_exactly(write_log, workers):
    root = str(write_log(DAYS, change=dirty))

    def batches(start):
        log = ParquetLog(root, on_bad_rows="drop")
        plan = plan_windows(log, window=16, batch_size=4)
        loader = WindowedLoader(log, plan=plan, seed=2, start_batch=start, num_workers=workers)
        return [(b.row_B.tolist(), b.mask_BT.tolist()) for b in loader]

    whole = batches(0)
    assert all(batches(start) == whole[start:] for start in range(0, 13, 3))


@pytest.mark.parametrize("tasks", [None, ["click"]])
def test_a_resumed_run_knows_the_rows_dropped_before(write_log, tasks):
    root = str(write_log(DAYS, change=dirty))

    def module():
        log = ParquetLog(root, on_bad_rows="drop")
        chosen = log if tasks is None else Selected(log, log.schema.select(tasks=tasks))
        return RankingDataModule(chosen, batch_size=4, window=16, num_workers=0)

    first, second = module(), module()
    for batch in first.train_dataloader():
        first.advance(batch)
    assert first.log.num_bad_rows == 3
    second.load_state_dict(first.state_dict())
    assert list(second.train_dataloader()) == []
    assert second.log.num_bad_rows == 3


def test_quarantined_rows_lie_beside_the_data_with_the_reason(write_log):
    root = write_log(DAYS, change=dirty)
    log, batch = read_all(root, on_bad_rows="quarantine")
    assert log.num_bad_rows == 3
    rows = pq.read_table(root / "quarantine").to_pylist()
    assert [row["id"] for row in rows] == BAD
    assert [row["reason"] for row in rows] == [
        "tags: id out of range (77)",
        "price: NaN or infinity; slot: id below 0 (-5)",
        "slot: id out of range (99)",
    ]
    assert [row["row_group"] for row in rows] == [0, 1, 2]
    assert {row["file"] for row in rows} == {SECOND_DAY}
    _, dropped = read_all(root, on_bad_rows="drop")
    assert torch.equal(batch.mask_BT, dropped.mask_BT)
    read_all(root, on_bad_rows="quarantine")
    assert len(pq.read_table(root / "quarantine")) == 3


def test_a_quarantine_that_cannot_be_written_is_refused(write_log):
    root = write_log(DAYS, change=dirty)
    (root / "quarantine").write_text("in the way")
    refused(root, "cannot write bad rows to", "quarantine", on_bad_rows="quarantine")


def test_constant_columns_are_warned_about_in_one_line(write_log, caplog):
    def change(day, columns):
        columns["price"] = pa.array([2.5] * 25)
        columns["click"] = pa.array([0] * 25, pa.int8())

    read_all(write_log(DAYS, change=change))
    assert [record.getMessage() for record in caplog.records] == [
        "schema 'made_up' names columns from which nothing can be learned: 'price' (always 2.5), 'click' (always 0)"
    ]


def test_a_column_that_varies_between_files_only_is_no_constant(write_log, caplog):
    def change(day, columns):
        columns["price"] = pa.array([float(day)] * 25)

    read_all(write_log(DAYS, change=change))
    assert not caplog.records
