"""Small row groups: the warning, and the log rewritten with larger ones."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranker.commands.data_commands import prepare
from ranker.data import parquet_index
from ranker.data.manifest import Manifest
from ranker.data.parquet_log import ParquetLog
from ranker.errors import UserError
from support import assert_equal


def rows(root):
    log = ParquetLog(str(root))
    batch = log.read(0, log.num_rows)
    lists = {name: (ragged.values, ragged.offsets) for name, ragged in batch.ragged.items()}
    columns = ("dense_BF", "onehot_BC", "labels_BT", "mask_BT", "time_ms_B", "row_B")
    return {name: getattr(batch, name) for name in columns} | lists


def test_a_log_of_tiny_row_groups_is_warned_about_and_can_be_rewritten(
    write_log, tmp_path, caplog, capsys, monkeypatch
):
    monkeypatch.setattr(parquet_index, "_MANY_GROUPS", 60)  # a thousand would take a second to read

    def change(day, columns):
        if day == 1:  # types that differ from the first file's
            columns["user"] = columns["user"].cast(pa.uint64()).cast(pa.int64())
            columns["slot"] = columns["slot"].cast(pa.int64())
            columns["country"] = columns["country"].cast(pa.large_string())
            columns["t"] = columns["t"].cast(pa.timestamp("ms")).cast(pa.timestamp("us"))

    root = write_log({0: 30, 1: 30}, row_group_size=1, change=change)
    (root / "day=2022-04-26.parquet").rename(root / "a.parquet")
    expected = rows(root)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "60 row groups of 1 rows on average" in warning
    assert f"prepare_data.py rewrite {root} NEW_FOLDER" in warning

    assert prepare(["rewrite", str(root), str(tmp_path / "new"), "--quiet"]) == 0
    assert "60 rows in 2 days" in capsys.readouterr().out
    caplog.clear()
    assert_equal(expected, rows(tmp_path / "new"))
    assert not caplog.records
    files = sorted((tmp_path / "new").glob("*.parquet"))
    assert [file.name for file in files] == ["day=2022-04-25.parquet", "day=2022-04-26.parquet"]
    assert [pq.read_metadata(file).num_row_groups for file in files] == [1, 1]
    manifest = Manifest.read(tmp_path / "new")
    assert [entry.rows for entry in manifest.files] == [30, 30]
    assert all(entry.sha256 for entry in manifest.files)


def test_a_file_that_spans_midnight_is_cut_into_days(write_log, tmp_path):
    root = write_log({0: 30, 1: 30})
    table = pa.concat_tables(pq.read_table(file) for file in sorted(root.glob("*.parquet")))
    for file in root.glob("*.parquet"):
        file.unlink()
    pq.write_table(table, root / "all.parquet")
    assert prepare(["rewrite", str(root), str(tmp_path / "new"), "--quiet"]) == 0
    assert [entry.rows for entry in Manifest.read(tmp_path / "new").files] == [30, 30]
    assert_equal(rows(root), rows(tmp_path / "new"))


def test_a_full_destination_is_refused_and_an_unsorted_log_sorted(write_log, tmp_path, capsys):
    root = write_log({0: 30, 1: 30})
    assert prepare(["rewrite", str(root), str(root), "--quiet"]) == 2
    assert "exists and is not empty; name a new folder" in capsys.readouterr().err
    expected, file = rows(root), root / "day=2022-04-26.parquet"
    pq.write_table(pq.read_table(file).take(pa.array([1, 0, *range(2, 30)])), file)
    with pytest.raises(UserError, match=f"row 1 is earlier than the row before it.*rewrite {root} NEW_FOLDER"):
        rows(root)
    assert prepare(["rewrite", str(root), str(tmp_path / "new"), "--quiet"]) == 0
    assert_equal(expected, rows(tmp_path / "new"))
    assert Manifest.read(tmp_path / "new").source["sorted"]


def test_a_flipped_bit_in_a_page_with_a_checksum_is_found(write_log):
    root = write_log({0: 25, 1: 25})
    path = root / "day=2022-04-25.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    rows(root)
    raw = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(2)
    raw[column.data_page_offset + column.total_compressed_size - 3] ^= 4
    path.write_bytes(bytes(raw))
    name = column.path_in_schema
    with pytest.raises(UserError, match=f"day=2022-04-25.parquet, column '{name}', row group 0: .*CRC"):
        rows(root)
