"""Layouts and types in which logs of one's own come: subfolders, Hive's keys, equivalent types, kinds of times."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ranker.data.parquet_log import ParquetLog
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.errors import UserError
from support import assert_equal

DAYS = {0: 25, 1: 25, 2: 25}
DAY_MS = 86_400_000
START_MS = 1_650_844_800_000
SECOND_DAY = "day=2022-04-26.parquet"
DAY_NAMES = [f"day=2022-04-{day}.parquet" for day in (25, 26, 27)]


def whole(root, **options):
    log = ParquetLog(str(root), **options)
    batch = log.read(0, log.num_rows)
    columns = ("dense_BF", "onehot_BC", "labels_BT", "mask_BT", "time_ms_B", "row_B")
    plain = {name: getattr(batch, name) for name in columns}
    lists = {name: (ragged.values, ragged.offsets) for name, ragged in batch.ragged.items()}
    return log, {**plain, **lists}


def cast(day, **kinds):
    def change(this_day, columns):
        if this_day == day:
            for name, kind in kinds.items():
                column = columns[name].cast(pa.timestamp("ms")) if name == "t" else columns[name]
                columns[name] = column.cast(kind)

    return change


def refused(root, *parts, **options):
    with pytest.raises(UserError) as caught:
        whole(root, **options)
    for part in (*parts,):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["{day}/part-0.parquet", "year=2022/month={month}/{day}.parquet", "{day}.PARQUET"])
def test_files_may_lie_in_subfolders_and_end_in_capitals(write_log, tmp_path, layout):
    _, expected = whole(write_log(DAYS, name="flat"))
    root = write_log(DAYS)
    for number, name in enumerate(DAY_NAMES):  # months 9, 10, 11: the order of names is not that of the times
        path = root / layout.format(day=name.removesuffix(".parquet"), month=9 + number)
        path.parent.mkdir(parents=True, exist_ok=True)
        (root / name).rename(path)
    log, found = whole(root)
    assert_equal(expected, found)
    assert log.train_rows == 50


def test_files_are_read_in_the_order_of_their_times(write_log):
    _, expected = whole(write_log(DAYS, name="flat"))
    root = write_log(DAYS)
    for name, other in zip(DAY_NAMES, ("c", "b", "a"), strict=True):
        (root / name).rename(root / f"{other}.parquet")
    log, found = whole(root)
    assert_equal(expected, found)
    assert [place.file for place in log.index.places][::3] == ["c.parquet", "b.parquet", "a.parquet"]


def test_files_that_are_passed_over_are_named(write_log, caplog):
    root = write_log({0: 25, 1: 25})
    (root / "raw.csv").write_text("a")
    (root / "_day=3.parquet").write_text("a")
    for folder in ("quarantine", "other"):
        (root / folder).mkdir()
        (root / folder / "x.parquet").write_text("a")
    (root / "other" / "schema.yaml").write_text("a log of its own")
    (root / "_SUCCESS").write_text("")
    whole(root)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "passed over _day=3.parquet, other/x.parquet, raw.csv; only *.parquet" in warning


def test_a_folder_with_other_files_only_names_them(write_log):
    root = write_log({0: 5})
    (root / "day=2022-04-25.parquet").rename(root / "_day=2022-04-25.parquet")
    refused(root, "no Parquet files in", "passed over: _day=2022-04-25.parquet")


def hive(tmp_path, **changed):
    schema = Schema(
        name="hive",
        time_column="day",
        dense=(DenseFeature(name="price"),),
        categorical=(
            CategoricalFeature(name="country", vocabulary=("de", "fr")),
            CategoricalFeature(name="shop", hash_buckets=5000),
            CategoricalFeature(name="slot", num_embeddings=5),
        ),
        tasks=(Task(name="click"),),
    )
    schema.to_yaml(tmp_path / "schema.yaml")
    for number in range(4):
        keys = {"day": f"2024-01-0{number + 1}", "country": ("de", "fr")[number % 2], "shop": str(number), "slot": "3"}
        keys |= changed if number == 2 else {}
        path = tmp_path.joinpath(*(f"{key}={value}" for key, value in keys.items()), "part-0.parquet")
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"price": [0.5, 1.5], "click": [0, 1]}), path)
    return tmp_path


def test_columns_may_stand_in_the_names_of_folders(tmp_path):
    log, found = whole(hive(tmp_path, country="__HIVE_DEFAULT_PARTITION__"))
    assert (log.num_rows, log.train_rows) == (8, 6)
    assert found["time_ms_B"].tolist() == [1_704_067_200_000 + DAY_MS * (i // 2) for i in range(8)]
    assert found["onehot_BC"][::2, 0].tolist() == [1, 2, 0, 2]
    assert found["onehot_BC"][:, 2].tolist() == [4] * 8
    assert len(set(found["onehot_BC"][:, 1].tolist())) == 4
    # Strings, although all of them are digits: a folder that is added later must not change the rows of the others.
    assert log.id_types == {"country": "string", "shop": "string", "slot": "integer"}


def test_a_folder_name_of_the_wrong_type_is_named(tmp_path):
    refused(hive(tmp_path, slot="late"), "'late' in the name of a folder is no int64 for column 'slot'")


@pytest.mark.parametrize(
    "kinds",
    [
        {"slot": pa.int64(), "click": pa.float64(), "watch": pa.uint64(), "price": pa.float32(), "user": pa.uint64()},
        {"country": pa.large_string(), "tags": pa.large_list(pa.int64()), "t": pa.timestamp("ms"), "id": pa.int32()},
        {"country": pa.dictionary(pa.int8(), pa.string()), "t": pa.timestamp("us", tz="UTC"), "click": pa.bool_()},
        {"country": pa.string_view(), "t": pa.timestamp("ns", tz="Asia/Tokyo"), "price": pa.float16()},
    ],
)
def test_equivalent_types_in_different_files_give_the_same_rows(write_log, kinds):
    _, expected = whole(write_log(DAYS, name="plain"))
    _, found = whole(write_log(DAYS, change=cast(1, **kinds)))
    assert_equal(expected, found)


@pytest.mark.parametrize("day", [0, 1])
def test_a_column_that_is_null_throughout_a_file_fits_every_type(write_log, day):
    def change(this_day, columns):
        if this_day == day:
            for name in ("country", "tags", "click", "user"):
                columns[name] = pa.nulls(25)

    _, found = whole(write_log(DAYS, change=change))
    rows = slice(25 * day, 25 * day + 25)
    assert not found["onehot_BC"][rows, :2].any()
    assert not found["mask_BT"][rows, 0].any()
    assert torch.equal(found["tags"][1][rows].diff(), torch.zeros(24, dtype=torch.int64))
    assert found["mask_BT"][:, 0].sum() == 50


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%d %H:%M:%S",
        "%Y-%m-%dT%H:%M:%SZ",
        "%Y-%m-%dT%H:%M:%S+00:00",
        "%Y-%m-%dT%H:%M",
    ],
)
def test_times_may_be_iso_strings(write_log, form):
    def change(day, columns):
        moments = (columns["t"].to_numpy() // 60_000 * 60_000).astype("datetime64[ms]").tolist()
        columns["t"] = pa.array([moment.strftime(form) for moment in moments])

    log, found = whole(write_log(DAYS, change=change))
    assert found["time_ms_B"].tolist() == [
        (START_MS + day * DAY_MS + i * (DAY_MS // 25)) // 60_000 * 60_000 for day in range(3) for i in range(25)
    ]
    assert log.train_rows == 50


def test_zones_may_be_mixed_in_one_column(write_log):
    times = pa.array(["2022-04-25T23:30:00-01:00", "2022-04-26 00:31"])
    root = write_log({0: 2}, change=lambda day, columns: columns.update(t=times))
    _, found = whole(root, hold_out=0.5)
    assert found["time_ms_B"].tolist() == [START_MS + DAY_MS + minute * 60_000 for minute in (30, 31)]


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64()])
def test_times_may_be_dates(write_log, kind):
    def change(day, columns):
        columns["t"] = pa.array(np.full(25, 19107 + day, np.int32), pa.int32()).cast(pa.date32()).cast(kind)

    log, found = whole(write_log(DAYS, change=change))
    assert log.train_rows == 50
    assert found["time_ms_B"].unique().tolist() == [19107 * DAY_MS, 19108 * DAY_MS, 19109 * DAY_MS]


@pytest.mark.parametrize("statistics", [True, False])
def test_nanoseconds_that_are_no_whole_microseconds_are_read(write_log, statistics):
    root = write_log(DAYS)
    for name in DAY_NAMES:
        table = pq.read_table(root / name)
        times = table["t"].to_numpy() * 1_000_000 + 123_457
        table = table.set_column(0, "t", pa.array(times, pa.int64()).cast(pa.timestamp("ns")))
        pq.write_table(table, root / name, row_group_size=10, write_statistics=statistics)
    log, found = whole(root)
    assert log.train_rows == 50
    assert_equal(whole(write_log(DAYS, name="plain"))[1], found)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([f"2022-04-26 {hour:02}:00:0x" for hour in range(25)], "row 0: '2022-04-26 00:00:0x' is no time; write ISO"),
        (
            [*[START_MS / 1000] * 3, float("nan"), *[START_MS / 1000] * 21],
            "rows have no time (NaN or infinity), first row 3",
        ),
        ([float("nan"), *[1e9] * 24], "rows have no time (NaN or infinity), first row 0"),
        (np.arange(25, dtype=np.uint64) + 2**63, "a time does not fit a 64-bit integer"),
        (np.arange(25) + 2**62, "the time of row 0 (4611686018427387904) is beyond the year 9892"),
        ([20_220_426] * 25, "column 't' (20220426) looks like a date written as a number"),
    ],
)
def test_a_time_that_is_none_is_refused_with_its_row(write_log, log_schema, values, wanted):
    schema = dataclasses.replace(log_schema, time_unit="s")
    root = write_log({0: 25}, schema=schema, change=lambda day, c: c.update(t=pa.array(values)))
    refused(root, wanted, hold_out=0.5)


@pytest.mark.parametrize(("unit", "factor"), [("s", 0.001), ("us", 1000), ("ns", 1_000_000)])
@pytest.mark.parametrize("kind", [np.int64, np.float64])
def test_numbers_are_read_in_the_unit_of_the_schema(write_log, log_schema, unit, factor, kind):
    def change(day, columns):
        columns["t"] = pa.array((columns["t"].to_numpy() // 1000 * 1000 * factor).astype(kind))

    _, found = whole(write_log(DAYS, schema=dataclasses.replace(log_schema, time_unit=unit), change=change))
    _, expected = whole(write_log(DAYS, name="plain"))
    assert torch.equal(found["time_ms_B"], expected["time_ms_B"] // 1000 * 1000)


def outlier(at, time_ms):
    def change(day, columns):
        if day == 2:
            times = columns["t"].to_numpy().copy()
            times[at] = time_ms
            columns["t"] = pa.array(times)

    return change


def test_one_row_years_later_is_no_hold_out(write_log):
    root = write_log(DAYS, change=outlier(24, 1_930_000_000_000))
    refused(root, "day=2022-04-27.parquet, column 't', row group 2: row 4 is at 2031-02-27", "data.days=[FIRST,LAST]")
    log, _ = whole(root, days=[None, "2022-04-27"])
    assert (log.train_rows, log.num_rows) == (50, 74)


def test_one_file_in_another_unit_is_refused(write_log):
    def change(day, columns):
        if day == 2:
            columns["t"] = pa.array(columns["t"].to_numpy() * 1000)

    root = write_log(DAYS, change=change)
    refused(root, "day=2022-04-27.parquet", "is not in 1990 .. 2100 in 'ms', but is in 'us'", "all files in one unit")


def test_a_file_years_before_the_others_is_refused(write_log):
    def change(day, columns):
        if day == 0:
            columns["t"] = pa.array(columns["t"].to_numpy() - 1000 * DAY_MS)

    root = write_log(DAYS, change=change)
    refused(root, f"{SECOND_DAY}, column 't', row group 0: begins at 2022-04-26 00:00:00, 1,000 days after the time")


@pytest.mark.parametrize(("hold_out", "rows"), [("6h", 7), ("2.5h", 3), ("100h", 25), (0.1, 3), (0.5, 13), (0.999, 25)])
def test_a_log_of_one_day_holds_out_hours_or_a_share(write_log, hold_out, rows):
    root = write_log({0: 25})
    refused(root, "leave none to train on", "give data.hold_out hours (6h) or a share of the rows (0.1)")
    if rows >= 25:
        refused(root, "leave none to train on", hold_out=hold_out)
        return
    log, found = whole(root, hold_out=hold_out)
    assert log.num_rows - log.train_rows == rows
    if isinstance(hold_out, str):
        hours = float(hold_out.removesuffix("h"))
        last = found["time_ms_B"][-1]
        assert rows == int((found["time_ms_B"] > last - hours * 3_600_000).sum())


@pytest.mark.parametrize("value", ["6", "h", "-1h", "0h", 0, 1, 1.5, -0.1, True, float("nan")])
def test_a_hold_out_that_is_none_is_refused(write_log, value):
    refused(write_log(DAYS), "data.hold_out must be hours, such as 6h, or a share of the rows", hold_out=value)
