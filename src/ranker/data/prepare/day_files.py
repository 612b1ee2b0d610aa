"""One Parquet file a UTC day, written piece by piece in the order of time, and what the manifest says of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.manifest import FileEntry, day_file, sha256_of
from ranker.data.prepare.recipe import TIME
from ranker.data.schema import Schema, Task

DAY_MS = 86_400_000
ROW_GROUP = 65_536


class DayFiles:
    """Takes finished rows in ascending time and cuts them by UTC day; a context manager.

    Args:
        root: the directory for the files.
        schema: the columns to keep, and the tasks whose labels are averaged.

    Attributes:
        entries: of the days that are complete, which is all of them once the context is left.
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
        """Writes rows, none of them earlier than those before."""
        for _, rows in frame.group_by(pl.col(TIME).floordiv(DAY_MS), maintain_order=True):
            table = _plain(rows.select(self._schema.columns()).to_arrow())
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
    """A file while it is open, with running sums of its labels."""

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
        """What the manifest says of the closed file."""
        return FileEntry(
            path=self.path.name,
            rows=self._rows,
            time_min_ms=self._times[0],
            time_max_ms=self._times[-1],
            sha256=sha256_of(self.path),
            label_rates={name: total / count if count else None for name, (total, count) in self._sums.items()},
        )


def _plain(table: pa.Table) -> pa.Table:
    """The same columns in plain Arrow types, so that any reader of Parquet knows them."""
    return table.cast(pa.schema([pa.field(field.name, _plain_type(field.type)) for field in table.schema]))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    is_text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return pa.string() if is_text else kind


def _label(task: Task) -> pl.Expr:
    """The label as it is trained on: ``transform(scale * y)``, or y >= at_least."""
    y = pl.col(task.column)
    if task.mask:
        y = pl.when(pl.col(task.mask)).then(y)
    if task.type == "binary":
        return (y >= (1 if task.at_least is None else task.at_least)).cast(pl.Float64)
    y = y.cast(pl.Float64) * task.scale
    return y.sign() * y.abs().log1p() if task.transform == "log1p" else y
