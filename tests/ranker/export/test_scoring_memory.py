"""Scoring a file with one very large row group needs far less memory than the size of the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROWS, FEATURES = 4_000_000, 8
SCORE = """
import resource, sys
from pathlib import Path
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.export.program_runtime import Scored
from ranker.export.scoring import ParquetRows, score_file

schema = Schema(
    name="wide",
    time_column="t",
    dense=tuple(DenseFeature(name=f"x{i}") for i in range(8)),
    categorical=(CategoricalFeature(name="user", hash_buckets=100),),
    tasks=(Task(name="click"),),
)
rows = ParquetRows(Path(sys.argv[1]), schema, piece_rows=8192)
engine = lambda batch: Scored(batch.dense_BF[:, :1], batch.dense_BF[:, :1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score_file(rows, engine, Path(sys.argv[2]), tasks=["click"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    columns = {f"x{i}": draw.random(ROWS) for i in range(FEATURES)}
    table = pa.table({**columns, "user": draw.integers(0, 1 << 40, ROWS)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=ROWS)
    assert (tmp_path / "in.parquet").stat().st_size > 250e6

    command = [sys.executable, "-c", SCORE, str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak < 200e6  # 130 MB; 390 MB where Arrow fetches columns whole
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == ROWS
