from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task

PEAK = """
import resource, sys
from ranker.data.loader import WindowedLoader
from ranker.data.parquet_log import ParquetLog
from ranker.data.windows import plan_windows

log = ParquetLog(sys.argv[1])
plan = plan_windows(log, window=65_536, batch_size=8_192)
rows = sum(len(batch) for batch in WindowedLoader(log, plan=plan, seed=0, num_workers=2))
assert rows == log.train_rows, rows
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

FIRST_MS = 1_767_225_600_000  # 2026


def write_long_log(root, rows, *, block=250_000):
    root.mkdir()
    Schema(
        name="long",
        time_column="t",
        dense=(DenseFeature(name="x"),),
        categorical=(
            CategoricalFeature(name="user", hash_buckets=1000),
            CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=10),
        ),
        tasks=(Task(name="click"),),
    ).to_yaml(root / "schema.yaml")
    offsets = pa.array(np.arange(block + 1) * 2, pa.int32())
    tags = pa.ListArray.from_arrays(offsets, pa.array(np.arange(2 * block) % 10))
    for day in range(rows // 1_000_000):
        writer = None
        for start in range(0, 1_000_000, block):
            row = np.arange(start, start + block)
            columns = {
                "t": FIRST_MS + row + 86_400_000 * day,
                "x": row / 7,
                "user": row * 31,
                "tags": tags,
                "click": row % 2,
            }
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(root / f"day={day:04d}.parquet", table.schema)
            writer.write_table(table, row_group_size=65_536)
        writer.close()
    return root


def peak_kb(root):
    run = subprocess.run([sys.executable, "-c", PEAK, str(root)], check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.slow
def test_memory_is_bounded_by_the_window_and_not_by_the_log(tmp_path):
    short = peak_kb(write_long_log(tmp_path / "short", 2_000_000))
    long = peak_kb(write_long_log(tmp_path / "long", 20_000_000))
    assert long == pytest.approx(short, rel=0.10)


PREPARE_PEAK = """
import resource, sys
from ranker.data.prepare import prepare

assert prepare("movielens", sys.argv[1], sys.argv[2]).rows == int(sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_ratings(root, rows, *, block=500_000):
    root.mkdir()
    (root / "movies.csv").write_text("movieId,title,genres\n" + "".join(f"{i},Film (1999),Drama\n" for i in range(100)))
    with open(root / "ratings.csv", "w", encoding="utf-8") as file:
        file.write("userId,movieId,rating,timestamp\n")
        for start in range(0, rows, block):
            row = np.arange(start, start + block)
            time_s = 978_307_200 + row * 7_919 % (30 * 86_400)  # not in order: every bucket gets rows of every block
            lines = zip(row.tolist(), (row % 100).tolist(), time_s.tolist(), strict=True)
            file.writelines(f"{user},{film},3.5,{time}\n" for user, film, time in lines)
    return root


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preparing_needs_memory_for_a_bucket_and_not_for_the_log(tmp_path):
    peaks = []
    for rows in (2_000_000, 20_000_000):
        source = write_ratings(tmp_path / f"src-{rows}", rows)
        command = [sys.executable, "-c", PREPARE_PEAK, str(source), str(tmp_path / f"dst-{rows}"), str(rows)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(run.stdout.splitlines()[-1]))
    assert peaks[1] < 1.5 * peaks[0]  # ten times the rows; Polars' own buffers vary from run to run
