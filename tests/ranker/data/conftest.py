from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ranker.data.batch import Batch, Ragged
from ranker.data.log import Log
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task

DAY_MS = 86_400_000
START_MS = 1_650_844_800_000  # 2022-04-25 00:00 UTC


class ArrayLog(Log):
    """A log in memory. Every column is a function of the row's position."""

    train_rows = num_rows = 0  # plain attributes in place of the properties

    def __init__(self, train_rows: int, *, eval_rows: int = 5, times_ms: np.ndarray | None = None) -> None:
        self.schema = Schema(
            name="array",
            time_column="t",
            dense=(DenseFeature(name="x"),),
            categorical=(
                CategoricalFeature(name="id", num_embeddings=10**6),
                CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=10**6),
            ),
            tasks=(Task(name="click"),),
        )
        self.train_rows, self.num_rows = train_rows, train_rows + eval_rows
        self.times = np.arange(self.num_rows) * 1000 + START_MS if times_ms is None else times_ms
        self.reads: list[tuple[int, int]] = []
        self.broken_from = self.num_rows

    def read(self, start: int, stop: int) -> Batch:
        assert 0 <= start < stop <= self.num_rows
        self.reads.append((start, stop))
        if stop > self.broken_from:
            raise OSError(f"row {self.broken_from} is on a bad block")
        row = torch.arange(start, stop)
        lengths = row % 3
        return Batch(
            dense_BF=row[:, None].float(),
            onehot_BC=row[:, None] + 1,
            ragged={
                "tags": Ragged(
                    torch.repeat_interleave(row, lengths),
                    torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(lengths, 0)]),
                )
            },
            labels_BT=(row[:, None] % 2).float(),
            mask_BT=torch.ones(len(row), 1, dtype=torch.bool),
            time_ms_B=torch.from_numpy(self.times[start:stop]),
            row_B=row,
        )

    def row_at_time(self, time_ms: int) -> int:
        return int(np.searchsorted(self.times, time_ms))

    def time_at_row(self, row: int) -> int:
        return int(self.times[row])


@pytest.fixture
def array_log() -> type[ArrayLog]:
    return ArrayLog


def log_columns(first_row: int, times_ms: np.ndarray) -> dict[str, Any]:
    """Columns of every kind, as functions of the row's position in the log."""
    row = np.arange(first_row, first_row + len(times_ms))
    return {
        "t": pa.array(times_ms, pa.int64()),
        "id": pa.array(row, pa.int64()),
        "price": pa.array(row / 4, pa.float64()),
        "user": pa.array(row * 2**33, pa.int64()),
        "country": pa.array([("de", "fr", None)[i % 3] for i in row], pa.string()),
        "slot": pa.array(row % 7, pa.int16()),
        "tags": pa.array([list(range(i % 4)) for i in row], pa.list_(pa.int32())),
        "click": pa.array(row % 2, pa.int8()),
        "watch": pa.array(np.where(row % 5 == 0, 0, row), pa.int32()),
    }


LOG_SCHEMA = Schema(
    name="made_up",
    time_column="t",
    row_id="id",
    dense=(DenseFeature(name="price", scale=0.5),),
    categorical=(
        CategoricalFeature(name="user", hash_buckets=1000),
        CategoricalFeature(name="country", vocabulary=("fr", "de")),
        CategoricalFeature(name="slot", num_embeddings=7),
        CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=4),
    ),
    tasks=(Task(name="click"), Task(name="watch", type="regression", transform="log1p")),
)


@pytest.fixture
def log_schema() -> Schema:
    return LOG_SCHEMA


WriteLog = Callable[..., Path]


@pytest.fixture
def write_log(tmp_path: Path) -> WriteLog:
    """Writes rows by day into Parquet files; ``change`` may change a file's columns before they are written."""

    def write(
        rows_by_day: Mapping[int, int],
        *,
        row_group_size: int = 10,
        schema: Schema = LOG_SCHEMA,
        change: Callable[[int, dict[str, Any]], Any] = lambda day, columns: None,
        manifest: bool = False,
        name: str = "log",
    ) -> Path:
        root = tmp_path / name
        root.mkdir()
        schema.to_yaml(root / "schema.yaml")
        first = 0
        entries = []
        for day, rows in rows_by_day.items():
            times = START_MS + day * DAY_MS + np.arange(rows) * (DAY_MS // max(rows, 1))
            columns = log_columns(first, times)
            change(day, columns)
            date = dt.date(2022, 4, 25) + dt.timedelta(days=day)
            file = f"day={date}.parquet"
            pq.write_table(pa.table(columns), root / file, row_group_size=row_group_size)
            entries.append({"path": file, "rows": rows})
            first += rows
        if manifest:
            (root / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))
        return root

    return write
