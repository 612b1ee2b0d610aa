"""Makes a long log of a short one, for benchmarks: python scripts/bench/repeat_log.py SRC DST --rows 2000000.

The training rows of a prepared log again and again, each time later, then its hold-out; files, columns and values are
as they were. What is measured on it says something about speed and memory at that length, nothing about learning.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def repeat(source: Path, target: Path, rows: int) -> None:
    """Writes a log of so many training rows; all files but the last are training rows, as `data.eval_days=1` has it."""
    schema = yaml.safe_load((source / "schema.yaml").read_text(encoding="utf-8"))
    time, day = schema["time_column"], 86_400 * PER_SECOND[schema.get("time_unit", "ms")]
    *days, holdout = sorted(source.glob("*.parquet"))
    first = pc.min(pq.read_table(days[0], columns=[time])[time]).as_py()
    last = pc.max(pq.read_table(holdout, columns=[time])[time]).as_py()
    span = ((last - first) // day + 1) * day  # whole days, which is what a hold-out is counted in
    target.mkdir(parents=True)
    shutil.copy(source / "schema.yaml", target / "schema.yaml")
    written = files = 0
    while written < rows:
        shift = files // len(days) * span
        written += _copy(days[files % len(days)], target, files, time, shift, most=rows - written)
        files += 1
    _copy(holdout, target, files, time, (files - 1) // len(days) * span, most=None)


def _copy(path: Path, target: Path, number: int, time: str, shift: int, *, most: int | None) -> int:
    table = pq.read_table(path).slice(0, most)
    later = pc.add(table[time], pa.scalar(shift, table[time].type))
    table = table.set_column(table.schema.get_field_index(time), time, later)
    pq.write_table(table, target / f"part={number:05d}.parquet")
    return table.num_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the long log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a prepared log")
    parser.add_argument("target", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--rows", type=int, required=True, help="training rows")
    given = parser.parse_args(arguments)
    repeat(given.source, given.target, given.rows)


if __name__ == "__main__":
    main()
