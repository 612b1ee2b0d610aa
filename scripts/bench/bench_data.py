"""How fast the data path is: python scripts/bench/bench_data.py [--source DIR] [--json FILE].

Every target is a ratio of two things measured in turns in this one process, so that a busy or a slow machine changes
both alike: the loader against a bare pyarrow scan of the same columns, against the way people write it first (a
``Dataset`` that gives a row at a time, collated by torch), and against itself on longer logs.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from bench_report import Line, report
from ranker.data.loader import WindowedLoader
from ranker.data.parquet_log import ParquetLog
from ranker.data.prepare import prepare
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.data.windows import plan_windows
from ranker.errors import UserError

BATCH = 1024
WINDOW = 16 * BATCH
START_MS = 1_699_920_000_000  # 2023-11-14 00:00 UTC


class RowDataset(Dataset[dict[str, Any]]):
    """The baseline, as it is written first: the columns in memory, and a row at a time made of them in Python.

    It knows integers alone as ids, which is what KuaiRand's prepared columns hold. Lists are padded to the longest,
    as default collate needs.
    """

    def __init__(self, rows: pa.Table, schema: Schema) -> None:
        self.columns = {name: rows[name].to_pylist() for name in schema.columns()}
        self.schema = schema
        self.longest = {f.name: max(map(len, filter(None, self.columns[f.column])), default=1) for f in schema.ragged}

    def __len__(self) -> int:
        return len(self.columns[self.schema.time_column])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"time_ms": self.columns[self.schema.time_column][index]}
        for dense in self.schema.dense:
            value = self.columns[dense.column][index]
            row[dense.name] = self._transformed(dense.fill_null or 0.0 if value is None else value, dense)
        for feature in self.schema.one_hot:
            row[feature.name] = self._embedding_row(self.columns[feature.column][index], feature)
        for feature in self.schema.ragged:
            ids = [self._embedding_row(i, feature) for i in self.columns[feature.column][index] or ()]
            row[feature.name] = torch.tensor(ids + [0] * (self.longest[feature.name] - len(ids)))
        for task in self.schema.tasks:
            label = self.columns[task.column][index]
            row[f"label/{task.name}"] = 0.0 if label is None else self._transformed(label, task)
        return row

    def _embedding_row(self, raw: Any, feature: CategoricalFeature) -> int:
        owner = self.schema.table_of(feature)
        if raw is None:
            return 0
        if owner.vocabulary:
            return owner.vocabulary.index(raw) + 1 if raw in owner.vocabulary else 0
        return raw + 1 if owner.num_embeddings else hash(raw) % owner.hash_buckets + 1

    @staticmethod
    def _transformed(value: float, column: DenseFeature | Task) -> float:
        value = column.scale * value
        return math.copysign(math.log1p(abs(value)), value) if column.transform == "log1p" else value


def load(root: Path, *, workers: int = 1) -> int:
    """Draws every training batch; gives the number of rows."""
    log = ParquetLog(str(root))
    plan = plan_windows(log, window=WINDOW, batch_size=BATCH)
    return sum(len(batch) for batch in WindowedLoader(log, plan=plan, seed=0, num_workers=workers))


def scan(root: Path, columns: list[str]) -> int:
    """Reads the same columns with pyarrow and does nothing with them; gives the number of rows."""
    rows = 0
    for path in sorted(root.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            rows += file.read_row_group(group, columns=columns).num_rows
    return rows


def load_by_row(root: Path, rows: int) -> int:
    """Draws rows from the same files one at a time, in batches, in random order; gives the number of rows."""
    schema = Schema.from_yaml(root / "schema.yaml")
    table = next(
        t for path in sorted(root.glob("*.parquet")) if len(t := pq.read_table(path, columns=schema.columns()))
    )
    dataset = RowDataset(table.slice(0, rows), schema)
    return sum(len(batch["time_ms"]) for batch in DataLoader(dataset, batch_size=BATCH, shuffle=True))


def rows_per_second(jobs: dict[str, Callable[[], int]], *, rounds: int) -> dict[str, list[float]]:
    """Runs the jobs in turns; speeds by job, one a round, after a round that is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            rows = job()
            if turn:
                speeds[name].append(rows / (time.perf_counter() - start))
    return speeds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def compare_loaders(root: Path, *, rounds: int) -> list[Line]:
    """The loader beside a bare scan (with Arrow's threads) and beside a row at a time."""
    columns = ParquetLog(str(root)).schema.columns()
    speeds = rows_per_second(
        {
            "loader, 2 workers": lambda: load(root, workers=2),
            "loader, 1 worker": lambda: load(root, workers=1),
            "loader, in line": lambda: load(root, workers=0),
            "bare pyarrow scan": lambda: scan(root, columns),
            "per-row Dataset": lambda: load_by_row(root, 4 * BATCH),
        },
        rounds=rounds,
    )
    lines = [Line(name, statistics.median(values), "rows/s") for name, values in speeds.items()]
    by_row = median_ratio(speeds["loader, 1 worker"], speeds["per-row Dataset"])
    by_scan = median_ratio(speeds["loader, 1 worker"], speeds["bare pyarrow scan"])
    lines.append(Line("loader / per-row Dataset", by_row, "x", ">= 50", by_row >= 50))
    lines.append(Line("loader / bare scan", by_scan, "x", ">= 0.333", by_scan >= 1 / 3))
    return lines


def write_log(root: Path, rows: int, *, block: int = 250_000) -> None:
    """Writes a log of so many training rows and one to hold out, by day of a million rows, a block at a time."""
    Schema(
        name="long",
        time_column="time_ms",
        dense=tuple(DenseFeature(name=f"x{i}", transform="log1p") for i in range(3)),
        categorical=(
            CategoricalFeature(name="user", hash_buckets=100_000),
            CategoricalFeature(name="item", num_embeddings=50_000),
            CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=100),
        ),
        tasks=(Task(name="click"), Task(name="watch", type="regression", transform="log1p")),
    ).to_yaml(root / "schema.yaml")
    random = np.random.default_rng(0)
    per_day = min(1_000_000, rows)
    lengths = random.integers(0, 4, block)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    fixed: dict[str, Any] = {
        **{f"x{i}": random.lognormal(size=block) for i in range(3)},
        "user": random.integers(0, 2**40, block),
        "item": random.integers(0, 50_000, block),
        "tags": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(random.integers(0, 100, offsets[-1]))),
        "click": (random.random(block) < 0.3).astype(np.int8),
        "watch": random.exponential(20, block),
    }
    for day, first in enumerate(range(0, rows + 1, per_day)):
        count = min(per_day, max(1, rows - first))
        writer = None
        for start in range(0, count, block):
            size = min(block, count - start)
            time_ms = START_MS + day * 86_400_000 + np.arange(start, start + size) * (80_000_000 // per_day)
            table = pa.table({"time_ms": time_ms, **{n: pa.array(column[:size]) for n, column in fixed.items()}})
            writer = writer or pq.ParquetWriter(root / f"day={day:04d}.parquet", table.schema)
            writer.write_table(table, row_group_size=65_536)
        if writer is not None:
            writer.close()


def compare_lengths(folder: Path, *, sizes: Sequence[int], rounds: int) -> list[Line]:
    """Time per row on logs of different lengths, each at its best: what disturbs a run only ever slows it down."""
    roots = {}
    for size in sizes:
        roots[size] = folder / f"rows={size}"
        roots[size].mkdir()
        write_log(roots[size], size)
    jobs: dict[str, Callable[[], int]] = {f"{size:,} rows": partial(load, root) for size, root in roots.items()}
    speeds = rows_per_second(jobs, rounds=rounds)
    lines = [Line(name, max(values), "rows/s") for name, values in speeds.items()]
    per_row = [1 / line.value for line in lines]
    spread = max(per_row) / min(per_row)
    lines.append(Line("time per row, slowest / fastest", spread, "x", "<= 1.10", spread <= 1.10))
    return lines


@contextmanager
def prepared(source: str | None) -> Iterator[Path | None]:
    """KuaiRand prepared into a temporary folder; a folder that is prepared already is taken as it is."""
    if source is None:
        yield None
    elif (Path(source) / "schema.yaml").is_file():
        yield Path(source)
    else:
        with tempfile.TemporaryDirectory() as folder:
            prepare("kuairand", source, Path(folder) / "kuairand")
            yield Path(folder) / "kuairand"


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keeps a log that is opened again and again from warning of its constant columns each time."""
    logger = logging.getLogger("ranker.data")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="published KuaiRand files, or a prepared folder; left out: no comparison")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000_000, 5_000_000, 20_000_000], help="rows")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    given = parser.parse_args(arguments)
    lines: list[Line] = []
    try:
        with without_warnings(), prepared(given.source) as root:
            if root is not None:
                lines += compare_loaders(root, rounds=given.rounds)
        if given.sizes:
            with tempfile.TemporaryDirectory() as folder:
                lines += compare_lengths(Path(folder), sizes=given.sizes, rounds=max(1, given.rounds // 2))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return report(lines, given.json)


if __name__ == "__main__":
    sys.exit(main())
