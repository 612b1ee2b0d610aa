"""Sorting of a raw log into one Parquet file per UTC day, with memory for BUCKET_ROWS rows (or one minute, if larger).

There are three streamed steps: the source files are converted to Parquet as they are, their rows are distributed to
buckets of whole minutes, and each bucket is deduplicated, sorted, finished and written. The log is never sorted whole.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.manifest import FileEntry, day_file, sha256_of
from ranker.data.prepare.buckets import SLOT_MS, Step, bucket_starts, deal
from ranker.data.prepare.recipe import TIME, Recipe
from ranker.data.schema import Schema, Task
from ranker.data.times import DAY_MS
from ranker.errors import UserError

ROW_GROUP = 65_536
FIRST_TIME_MS = 100_000_000_000  # 1973; a log that starts earlier has times in seconds


@dataclass(frozen=True, kw_only=True)
class Written:
    """The result of :func:`write_days`.

    Attributes:
        entries: the files, in time order.
        rows_read: rows of the sources.
    """

    entries: tuple[FileEntry, ...]
    rows_read: int


def write_days(recipe: Recipe, root: Path, *, staging: Path, step: Step) -> Written:
    """Writes a log's rows, without exact duplicates and in time order, into one file per UTC day.

    Args:
        recipe: source of the rows and how they are finished.
        root: an empty folder for the day files.
        staging: an empty folder for temporary files. The caller removes it.
        step: progress bar.

    Raises:
        UserError: a source file cannot be parsed, there are no rows, or their times are not plausible.
    """
    raw = _stage_all(recipe, staging, step)
    counts = rows_by_slot(slots_of(raw))
    starts, total = bucket_starts(counts), sum(counts.values())
    buckets = deal(raw, starts, staging, time=TIME, total=total, step=step)
    with step("sorting and writing", total) as advance, DayFiles(root, recipe.schema) as files:
        for bucket in buckets:
            frame = pl.read_parquet(bucket, glob=False)
            rows = len(frame)
            for path in bucket:
                path.unlink()
            files.add(recipe.finish(in_order(frame)))
            advance(rows)
    return Written(entries=tuple(files.entries), rows_read=total)


def in_order(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows without exact duplicates, in time order.

    Sorting by all columns makes the order of rows of the same time a property of the data.
    """
    return rows.unique(maintain_order=False).sort([TIME, *sorted(c for c in rows.columns if c != TIME)])


def stage(file: Path, frame: pl.LazyFrame | Path, path: Path) -> Path:
    """A source file as Parquet, with its columns and rows as they are.

    Args:
        file: the source, for errors.
        frame: its rows, or Parquet that holds them already.
        path: the file to write.

    Raises:
        UserError: the source cannot be parsed.
    """
    if isinstance(frame, Path):
        return frame
    try:
        frame.sink_parquet(path, compression="lz4")
    except pl.exceptions.PolarsError as error:
        if "os error 28" in str(error):
            # Polars wraps the system's error in its own, but the caller expects the system's.
            raise OSError(errno.ENOSPC, "no space left", str(path.parent)) from error
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}; fetch it again") from error
    return path


def _stage_all(recipe: Recipe, staging: Path, step: Step) -> list[Path]:
    """Each source file as Parquet."""
    staged = []
    for i, (file, frame) in enumerate(recipe.logs.items()):
        if isinstance(frame, Path):
            staged.append(frame)
            continue
        with step(f"reading {file.name}"):
            staged.append(stage(file, frame, staging / f"raw-{i}.parquet"))
    return staged


def slots_of(raw: Sequence[Path]) -> pl.DataFrame:
    """Number of rows (``len``) and first time of each nonempty slot of SLOT_MS, counted from 1970-01-01."""
    return (
        pl.scan_parquet(list(raw), glob=False)
        .group_by(pl.col(TIME).floordiv(SLOT_MS).alias("slot"))
        .agg(pl.len(), pl.col(TIME).min())
        .collect(engine="streaming")
    )


def rows_by_slot(slots: pl.DataFrame) -> dict[int, int]:
    """Number of rows of each nonempty slot, ascending.

    Args:
        slots: from ``slots_of``; a slot may occur several times.

    Raises:
        UserError: there are no rows, or their times are not plausible.
    """
    table = slots.group_by("slot").agg(pl.col("len").sum(), pl.col(TIME).min()).sort("slot", nulls_last=False)
    if len(table) == 0:
        raise UserError("the log has no rows, so there is nothing to prepare; look at the source files")
    if table["slot"][0] is None:
        raise UserError(f"{table['len'][0]} rows of the log have no time; drop them from the source files")
    if table[TIME][0] < FIRST_TIME_MS:
        raise UserError(f"a row's time is {table[TIME][0]} ms after 1970, too early to be real; is it in seconds?")
    return dict(zip(table["slot"].to_list(), table["len"].to_list(), strict=True))


def write_part(rows: pl.DataFrame, path: Path, schema: Schema) -> FileEntry:
    """Writes finished rows of one day, in ascending time, as a file of its own. Returns its manifest entry."""
    table = _with_basic_types(rows.select(schema.columns()).to_arrow())
    day = _Day(path, table.schema, schema)
    with day.writer:
        day.add(rows, table)
    return day.entry()


class DayFiles:
    """Cuts finished rows in ascending time by UTC day and writes one file per day. A context manager.

    Args:
        root: the folder for the files.
        schema: the columns to keep, and the tasks whose labels are averaged.

    Attributes:
        entries: manifest entries of the complete days. All days are complete once the context is left.
    """

    def __init__(self, root: Path, schema: Schema) -> None:
        self.entries: list[FileEntry] = []
        self._root, self._schema = root, schema
        self._day: _Day | None = None

    def __enter__(self) -> DayFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._day is not None:
            self._day.writer.close()
            if kind is None:
                self.entries.append(self._day.entry())

    def add(self, frame: pl.DataFrame) -> None:
        """Writes rows, none of them earlier than the previous ones."""
        for _, rows in frame.group_by(pl.col(TIME).floordiv(DAY_MS), maintain_order=True):
            table = _with_basic_types(rows.select(self._schema.columns()).to_arrow())
            name = datetime.fromtimestamp(rows[TIME][0] / 1000, tz=UTC).strftime("%Y-%m-%d")
            path = self._root / day_file(name)
            if self._day is not None and self._day.path != path:
                self._day.writer.close()
                self.entries.append(self._day.entry())
                self._day = None
            if self._day is None:
                self._day = _Day(path, table.schema, self._schema)
            self._day.add(rows, table)


class _Day:
    """An open day file with running sums of its labels."""

    def __init__(self, path: Path, columns: pa.Schema, schema: Schema) -> None:
        self.path, self._tasks = path, schema.tasks
        self.writer = pq.ParquetWriter(path, columns, compression="zstd")
        self._rows = 0
        self._times: list[int] = []
        self._sums = {task.name: (0.0, 0) for task in schema.tasks}

    def add(self, rows: pl.DataFrame, table: pa.Table) -> None:
        self.writer.write_table(table, row_group_size=ROW_GROUP)
        self._rows += len(rows)
        self._times = [*self._times[:1], rows[TIME][0], rows[TIME][-1]]
        for task in self._tasks:
            total, count = rows.select(_label(task).sum().alias("sum"), _label(task).count().alias("count")).row(0)
            self._sums[task.name] = (self._sums[task.name][0] + total, self._sums[task.name][1] + count)

    def entry(self) -> FileEntry:
        """The manifest entry of the closed file."""
        return FileEntry(
            path=self.path.name,
            rows=self._rows,
            time_min_ms=self._times[0],
            time_max_ms=self._times[-1],
            sha256=sha256_of(self.path),
            label_rates={name: total / count if count else None for name, (total, count) in self._sums.items()},
        )


def _with_basic_types(table: pa.Table) -> pa.Table:
    """The same columns in basic Arrow types, which every Parquet reader supports."""
    return table.cast(pa.schema([pa.field(field.name, _basic_type(field.type)) for field in table.schema]))


def _basic_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(_basic_type(kind.value_type))
    is_text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return pa.string() if is_text else kind


def _label(task: Task) -> pl.Expr:
    """The label used in training: ``transform(scale * y)``, or y >= at_least."""
    y = pl.col(task.column)
    if task.mask:
        y = pl.when(pl.col(task.mask)).then(y)
    if task.type == "binary":
        return (y >= (1 if task.at_least is None else task.at_least)).cast(pl.Float64)
    y = y.cast(pl.Float64) * task.scale
    return y.sign() * y.abs().log1p() if task.transform == "log1p" else y
