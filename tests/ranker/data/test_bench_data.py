from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from ranker.data.parquet_log import ParquetLog


@pytest.fixture
def bench_data(load_script):
    return load_script("bench_data")


def test_the_long_log_has_the_rows_it_is_asked_for(bench_data, tmp_path):
    bench_data.write_log(tmp_path, 2500, block=1000)
    assert ParquetLog(str(tmp_path)).train_rows == 2500


def test_a_missed_target_is_the_exit_status(bench_data, tmp_path, capsys, monkeypatch):
    arguments = ["--sizes", "3000", "6000", "--rounds", "1", "--json", str(tmp_path / "bench.json")]
    status = bench_data.main(arguments)
    lines = json.loads((tmp_path / "bench.json").read_text())
    assert [line["name"] for line in lines] == ["3,000 rows", "6,000 rows", "time per row, slowest / fastest"]
    assert set(lines[0]) == {"name", "value", "unit", "target", "ok"}
    assert status == (0 if lines[-1]["ok"] else 1)
    assert "time per row" in capsys.readouterr().out


def test_the_row_by_row_baseline_reads_the_same_values(bench_data, write_log, log_schema):
    root = write_log({0: 20, 1: 5})
    rows = bench_data.RowDataset(pq.read_table(root / "day=2022-04-25.parquet"), log_schema)
    batch = ParquetLog(str(root)).read(0, 20)
    for i in range(20):
        assert rows[i]["price"] == pytest.approx(batch.dense_BF[i, 0].item())
        assert [rows[i]["country"], rows[i]["slot"]] == batch.onehot_BC[i, 1:].tolist()
        assert rows[i]["label/watch"] == pytest.approx(batch.labels_BT[i, 1].item(), rel=1e-6)
    assert bench_data.load_by_row(root, 10) == 10
