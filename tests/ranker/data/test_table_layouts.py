"""What Spark, Hive, Impala and Delta write: types, folders, files in any order, files of rows that were deleted."""

from __future__ import annotations

import decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, Field, convert_to_deltalake, write_deltalake
from deltalake import Schema as DeltaSchema

from ranker.commands.data_commands import inspect, prepare
from ranker.data.loader import EvalLoader, WindowedLoader
from ranker.data.parquet_index import ParquetIndex
from ranker.data.parquet_log import ParquetLog
from ranker.data.prepare import buckets
from ranker.data.schema import CategoricalFeature, DenseFeature, GroupColumn, Schema, Task
from ranker.data.windows import plan_windows
from ranker.errors import UserError
from support import assert_equal

START_MS, DAY_MS = 1_767_225_600_000, 86_400_000
ROWS = 20
SCHEMA = Schema(
    name="shop",
    time_column="t",
    row_id="id",
    weight="w",
    groups=(GroupColumn(name="g"),),
    dense=(DenseFeature(name="x"),),
    categorical=(
        CategoricalFeature(name="u", hash_buckets=1000),
        CategoricalFeature(name="c", vocabulary=("a", "b")),
        CategoricalFeature(name="n", num_embeddings=10),
        CategoricalFeature(name="tags", kind="multi_hot", vocabulary=("p", "q")),
        CategoricalFeature(name="h", kind="sequence", hash_buckets=50),
    ),
    tasks=(Task(name="y"), Task(name="r", type="regression")),
)


def columns_of(day):
    row = np.arange(ROWS) + day * ROWS
    return {
        "t": pa.array(START_MS + day * DAY_MS + np.arange(ROWS) * 1000),
        "id": pa.array(row),
        "w": pa.array(1.0 + row % 2),
        "g": pa.array(row % 5),
        "x": pa.array(row / 4),
        "u": pa.array(row * 7),
        "c": pa.array([("a", "b", None)[i % 3] for i in row]),
        "n": pa.array(row % 10),
        "tags": pa.array([["p", "q"][: i % 3] for i in row], pa.list_(pa.string())),
        "h": pa.array([list(range(i % 4)) for i in row], pa.list_(pa.int64())),
        "y": pa.array(row % 2),
        "r": pa.array(row / 8),
    }


def write(root, change=lambda columns: None, **options):
    """Three days, one file each, in Hive's layout."""
    root.mkdir()
    SCHEMA.to_yaml(root / "schema.yaml")
    for day in range(3):
        columns = columns_of(day)
        change(columns)
        folder = root / f"date=2026-01-0{day + 1}"
        folder.mkdir()
        pq.write_table(pa.table(columns), folder / "part-00000.parquet", row_group_size=8, **options)
    return root


def whole(root):
    log = ParquetLog(str(root))
    batch = log.read(0, log.num_rows)
    names = ("dense_BF", "onehot_BC", "labels_BT", "mask_BT", "time_ms_B", "row_B", "weight_B", "groups_BG")
    lists = {name: (ragged.values, ragged.offsets) for name, ragged in batch.ragged.items()}
    return {name: getattr(batch, name) for name in names} | lists


def cast(**kinds):
    def change(columns):
        for name, kind in kinds.items():
            column = columns[name].cast(pa.timestamp("ms")) if pa.types.is_timestamp(kind) else columns[name]
            columns[name] = column.cast(kind)

    return change


def decimals(**kinds):
    def exact(value):
        return [exact(v) for v in value] if isinstance(value, list) else decimal.Decimal(str(value))

    def change(columns):
        for name, kind in kinds.items():
            columns[name] = pa.array([exact(value) for value in columns[name].to_pylist()], kind)

    return change


TIMES = [pa.timestamp("us"), pa.timestamp("s", tz="UTC"), pa.timestamp("ms", tz="Europe/Berlin"), pa.timestamp("ns")]
ZOO = {
    **{f"time {kind}": (cast(t=kind), {}) for kind in TIMES},
    "INT96": (cast(t=pa.timestamp("ns")), {"use_deprecated_int96_timestamps": True}),
    "decimal amounts": (decimals(x=pa.decimal128(10, 2), w=pa.decimal128(38, 9), r=pa.decimal256(50, 3)), {}),
    "decimal integers": (decimals(**dict.fromkeys(("id", "u", "n", "g", "y"), pa.decimal128(20, 0))), {}),
    "decimal times": (decimals(t=pa.decimal128(15, 0)), {}),
    "decimal times with a fraction": (decimals(t=pa.decimal128(20, 3)), {}),
    "decimals stored as integers": (
        decimals(t=pa.decimal128(18, 2), x=pa.decimal128(9, 2)),
        {"store_decimal_as_integer": True},
    ),
    "lists of decimals": (decimals(h=pa.list_(pa.decimal128(20, 0))), {}),
    "large": (cast(tags=pa.large_list(pa.large_string()), h=pa.large_list(pa.int64()), c=pa.large_string()), {}),
    "views": (cast(tags=pa.list_(pa.string_view()), c=pa.string_view()), {}),
    "dictionaries": (lambda c: c.update(c=c["c"].dictionary_encode(), u=c["u"].dictionary_encode()), {}),
    "lists of dictionaries": (
        lambda c: c.update(tags=pa.ListArray.from_arrays(c["tags"].offsets, c["tags"].values.dictionary_encode())),
        {},
    ),
    "binaries": (
        lambda c: c.update(
            c=c["c"].cast(pa.binary()),
            tags=pa.array([[v.encode() for v in tags] for tags in c["tags"].to_pylist()], pa.list_(pa.binary())),
        ),
        {},
    ),
    "null lists": (
        lambda c: c.update({n: pa.array([v or None for v in c[n].to_pylist()], c[n].type) for n in ("tags", "h")}),
        {},
    ),
    "unsigned and booleans": (cast(u=pa.uint64(), n=pa.uint8(), y=pa.bool_()), {}),
    "delta encodings": (
        lambda c: None,
        {"use_dictionary": False, "column_encoding": {"t": "DELTA_BINARY_PACKED", "c": "DELTA_BYTE_ARRAY"}},
    ),
    "no statistics": (lambda c: None, {"write_statistics": False, "data_page_version": "2.0"}),
}


@pytest.mark.parametrize("name", ZOO)
def test_each_type_that_spark_and_hive_write_gives_the_same_rows(tmp_path, name):
    change, options = ZOO[name]
    expected = whole(write(tmp_path / "plain"))
    found = whole(write(tmp_path / "log", change, **options))
    assert_equal(expected, found)


def test_a_date_beyond_nanoseconds_stays_what_it_is(tmp_path):
    far = pa.array([253_402_300_799_000] * ROWS).cast(pa.timestamp("ms"))  # 9999-12-31, a usual "never"
    root = write(tmp_path / "log", lambda c: c.update(t=far), use_deprecated_int96_timestamps=True)
    with pytest.raises(UserError, match=r"the time of row 0 .* is beyond the year 9892"):
        whole(root)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (decimals(u=pa.decimal128(20, 2)), "column 'u' is double; ids of 'u' are integers or strings"),
        (
            lambda c: c.update(u=pa.array([decimal.Decimal(2**64)] * ROWS, pa.decimal128(20, 0))),
            "row group 0: column 'u' .* cannot be read as int64",
        ),
        (lambda c: c.update(c=pa.array([b"\xff"] * ROWS)), "column 'c' .* cannot be read as large_string"),
    ],
)
def test_what_does_not_fit_is_refused_with_file_and_column(tmp_path, change, wanted):
    with pytest.raises(UserError, match=f"date=2026-01-01/part-00000.parquet.*{wanted}") as caught:
        whole(write(tmp_path / "log", change))
    assert "\n" not in str(caught.value)


def test_bookkeeping_of_spark_is_passed_over(tmp_path, caplog):
    root = write(tmp_path / "log")
    (root / "_SUCCESS").touch()
    (root / "._SUCCESS.crc").touch()
    (root / "date=2026-01-01" / ".part-00000.parquet.crc").write_text("crc")
    (root / "_committed_1").write_text("{}")
    running = root / "_temporary" / "0" / "_temporary" / "attempt_1" / "date=2026-01-04"
    running.mkdir(parents=True)
    (running / "part-00000.parquet").write_bytes(b"half a file")
    assert_equal(whole(write(tmp_path / "plain")), whole(root))
    (warning,) = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert "passed over _temporary/" in warning


def unsorted(root, seed=0, files=3):
    """Each day in some files, whose rows are in any order, as a shuffle leaves them."""
    random = np.random.default_rng(seed)
    for folder in sorted(root.glob("date=*")):
        table = pq.read_table(folder / "part-00000.parquet", partitioning=None)
        (folder / "part-00000.parquet").unlink()
        order = random.permutation(table.num_rows)
        for number, rows in enumerate(np.array_split(order, files)):
            pq.write_table(table.take(pa.array(rows)), folder / f"part-0000{number}.parquet", row_group_size=4)
    return root


@pytest.mark.parametrize("bucket_rows", [262_144, 7])
def test_unsorted_files_are_refused_with_the_command_that_sorts_them(tmp_path, capsys, monkeypatch, bucket_rows):
    monkeypatch.setattr(buckets, "BUCKET_ROWS", bucket_rows)
    monkeypatch.setattr(buckets, "SLOT_MS", 1000)
    monkeypatch.setattr(buckets, "OPEN_FILES", 2)  # nine buckets are dealt out in four rounds
    expected = whole(write(tmp_path / "plain"))
    root = unsorted(write(tmp_path / "log", cast(t=pa.timestamp("us", tz="UTC"))))
    assert inspect([str(root)]) == 2
    line = capsys.readouterr().err.strip()
    assert "part-0000" in line
    assert f"python scripts/prepare_data.py rewrite {root} NEW_FOLDER" in line
    assert "\n" not in line
    assert prepare(["rewrite", str(root), str(tmp_path / "new"), "--quiet"]) == 0
    assert_equal(expected, whole(tmp_path / "new"))
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        *(f"day=2026-01-0{day}.parquet" for day in (1, 2, 3)),
        "manifest.json",
        "schema.yaml",
    ]


def test_a_column_in_folder_names_is_put_into_the_files_by_rewrite_alone(tmp_path, capsys):
    root = write(tmp_path / "log", lambda columns: columns.pop("c"))
    for number, folder in enumerate(sorted(root.glob("date=*"))):
        (root / f"c={'ab'[number % 2]}").mkdir(exist_ok=True)
        folder.rename(root / f"c={'ab'[number % 2]}" / folder.name)
    schema = root / "schema.yaml"
    raw = tmp_path / "schema.yaml"
    raw.write_bytes(schema.read_bytes())
    assert prepare(["log", str(root), str(tmp_path / "new"), "--schema", str(raw), "--quiet"]) == 2
    assert f"column 'c' stands in the names of folders; put the schema into {root} and use" in capsys.readouterr().err
    expected = whole(root)
    assert prepare(["rewrite", str(root), str(tmp_path / "new"), "--quiet"]) == 0
    assert_equal(expected, whole(tmp_path / "new"))
    assert pq.read_table(tmp_path / "new" / "day=2026-01-02.parquet")["c"].unique().to_pylist() == ["b"]


def test_rows_of_one_time_keep_their_order_when_a_log_is_sorted(tmp_path):
    root = write(tmp_path / "log", lambda c: c.update(t=pa.array(c["t"].to_numpy() // 5000 * 5000)))
    expected = whole(root)
    for folder in root.glob("date=*"):  # later rows in the file of the smaller name
        table = pq.read_table(folder / "part-00000.parquet", partitioning=None)
        pq.write_table(table[10:], folder / "part-00000.parquet")
        pq.write_table(table[:10], folder / "part-00001.parquet")
    file = root / "date=2026-01-03" / "part-00000.parquet"
    table = pq.read_table(file, partitioning=None)
    pq.write_table(pa.concat_tables([table[5:], table[:5]]), file)
    assert prepare(["rewrite", str(root), str(tmp_path / "new"), "--quiet"]) == 0
    assert_equal(expected, whole(tmp_path / "new"))


def test_a_run_on_many_files_a_day_resumes_exactly_and_evaluation_reads_only_its_own_groups(tmp_path, monkeypatch):
    root = write(tmp_path / "log")
    for folder in root.glob("date=*"):  # several files a day, as a range partition writes them
        table = pq.read_table(folder / "part-00000.parquet", partitioning=None)
        for part in range(4):
            pq.write_table(table[5 * part : 5 * part + 5], folder / f"part-0000{part}.parquet")
    log = ParquetLog(str(root))
    plan = plan_windows(log, window=15, batch_size=6)
    one = [batch.row_B.tolist() for batch in WindowedLoader(log, plan=plan, seed=3)]
    assert sorted(row for batch in one for row in batch) == list(range(40))
    for start in (1, 4):
        rest = WindowedLoader(ParquetLog(str(root)), plan=plan, seed=3, start_batch=start, num_workers=0)
        assert [batch.row_B.tolist() for batch in rest] == one[start:]
    halves = [WindowedLoader(log, plan=plan, seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert [low.row_B.tolist() + high.row_B.tolist() for low, high in zip(*halves, strict=True)] == one

    read, groups = ParquetIndex.read, []
    monkeypatch.setattr(
        ParquetIndex, "read", lambda index, group, names: groups.append(group) or read(index, group, names)
    )
    fresh = ParquetLog(str(root))
    groups.clear()
    second = EvalLoader(fresh, start=40, stop=60, batch_size=20, rank=1, world_size=2, num_workers=0)
    assert [batch.row_B.tolist() for batch in second] == [list(range(50, 60))]
    assert groups == [10, 11]  # of 12: four files a day


def delta(root):
    """A table with three appended days, of which the second was written once too often and deleted again."""
    for day in (0, 1, 1, 2):
        table = pa.table(columns_of(day)).append_column("date", pa.array([f"2026-01-0{day + 1}"] * ROWS))
        write_deltalake(root, table, mode="append", partition_by=["date"])
    DeltaTable(root).delete("date = '2026-01-02'")
    table = pa.table(columns_of(1)).append_column("date", pa.array(["2026-01-02"] * ROWS))
    write_deltalake(root, table, mode="append")
    SCHEMA.to_yaml(root / "schema.yaml")
    return root


def test_of_a_delta_table_only_the_files_of_its_newest_version_are_read(tmp_path, caplog):
    root = delta(tmp_path / "delta")
    assert len(list(root.glob("date=*/*.parquet"))) == 5
    assert_equal(whole(write(tmp_path / "plain")), whole(root))
    DeltaTable(root).create_checkpoint()
    assert_equal(whole(tmp_path / "plain"), whole(root))
    assert not [record for record in caplog.records if "passed over" in record.getMessage()]
    next(root.glob("date=2026-01-03/*.parquet")).unlink()
    with pytest.raises(UserError, match="is in the log of the Delta table but not in its folder"):
        whole(root)


def test_files_of_one_name_in_several_folders_of_a_delta_table_are_all_read(tmp_path):
    root = tmp_path / "converted"  # Spark gives the files that one task writes the same name in each folder
    for day in range(3):
        (root / f"date=2026-01-0{day + 1}").mkdir(parents=True)
        pq.write_table(pa.table(columns_of(day)), root / f"date=2026-01-0{day + 1}" / "part-00000.parquet")
    dates = DeltaSchema([Field("date", "string")])
    convert_to_deltalake(str(root), partition_by=dates, partition_strategy="hive")
    SCHEMA.to_yaml(root / "schema.yaml")
    assert_equal(whole(write(tmp_path / "plain")), whole(root))
    DeltaTable(root).delete("date = '2026-01-02'")
    assert whole(root)["row_B"].tolist() == [*range(20), *range(40, 60)]


def test_a_raw_delta_table_is_prepared_without_its_deleted_rows(tmp_path, capsys):
    root = delta(tmp_path / "delta")
    (root / "schema.yaml").rename(tmp_path / "schema.yaml")
    schema = Schema.from_yaml(tmp_path / "schema.yaml")
    Schema.from_dict({**schema.to_dict(), "weight": "", "groups": []}).to_yaml(tmp_path / "schema.yaml")
    command = ["log", str(root), str(tmp_path / "new"), "--schema", str(tmp_path / "schema.yaml"), "--quiet"]
    assert prepare(command) == 0
    assert "read 60 rows, dropped 0 exact duplicates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("metadata/00001-x.metadata.json", "is an Iceberg table"),
        (".hoodie/hoodie.properties", "is a Hudi table"),
        ("_delta_log/00000000000000000000.json", "the log of the Delta table cannot be read"),
    ],
)
def test_a_table_whose_files_are_not_its_rows_is_refused(tmp_path, file, wanted):
    root = write(tmp_path / "log")
    (root / file).parent.mkdir()
    (root / file).write_text("{}")
    with pytest.raises(UserError, match=wanted) as caught:
        whole(root)
    assert "\n" not in str(caught.value)
