"""Rewrites a log of Parquet files as one file per UTC day with large row groups, a schema and a manifest."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ranker.atomic import locked, replacing_folder
from ranker.data.arrow_types import value_type
from ranker.data.filesystem import one_line
from ranker.data.manifest import FileEntry, Manifest, day_file, sha256_of
from ranker.data.parquet_index import ParquetIndex, open_index
from ranker.data.prepare.days import ROW_GROUP
from ranker.data.schema import SCHEMA_FILE
from ranker.data.times import DAY_MS, Ints, check_sorted, times_ms
from ranker.errors import UserError


def rewrite(source: str, destination: str | Path, *, advance: Callable[[int], object] = int) -> Manifest:
    """Writes the rows of a log, in their order, into a new folder.

    Only the columns of the schema are kept. Columns that stand in folder names become columns of the files. Where the
    types of files differ, the widest is used. The times become timestamps in ms, UTC, unless they are a feature too.

    Args:
        source: folder or URL of the log.
        destination: folder to create.
        advance: called with the number of rows written since the last call. The default does nothing.

    Raises:
        UserError: the log cannot be read, its types cannot be joined, or the destination is not empty.
    """
    index = open_index(source)
    target = Path(destination).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; name a new folder")
    columns = _common_columns(index)
    with locked(target), replacing_folder(target) as draft, _Days(draft, columns) as days:
        for group, place in enumerate(index.places):
            table = index.read(group, index.schema.columns())
            column = table[index.schema.time_column].combine_chunks()
            column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
            times = times_ms(column, index.schema, place)
            check_sorted(times, schema=index.schema, place=place)
            if index.schema.time_column not in index.schema.feature_columns():
                number = table.column_names.index(index.schema.time_column)
                moments = pa.array(times).cast(columns.field(index.schema.time_column).type)
                table = table.set_column(number, index.schema.time_column, moments)
            days.add(table.select(columns.names).cast(columns), times)
            advance(table.num_rows)
        days.close()
        index.schema.to_yaml(draft / SCHEMA_FILE)
        manifest = Manifest(files=tuple(days.entries), source={"kind": "rewrite", "source": str(source)})
        manifest.write(draft)
    return manifest


def _common_columns(index: ParquetIndex) -> pa.Schema:
    """The columns of the schema with types that hold the values of all files."""
    schema, files = index.schema, []
    for file, footer in index.metadata.items():
        stored = footer.schema.to_arrow_schema()
        added = index.from_folders[file]
        kinds = {name: added[name].type if name in added else stored.field(name).type for name in schema.columns()}
        if schema.time_column not in schema.feature_columns():
            kinds[schema.time_column] = pa.timestamp("ms", tz="UTC")
        files.append(pa.schema([pa.field(name, value_type(kind)) for name, kind in kinds.items()]))
    try:
        return pa.unify_schemas(files, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{index.root.url}: the files have types without a common one: {one_line(error)}") from error


class _Days:
    """Files of one UTC day each, of rows in ascending time. A context manager, which closes the open file.

    Args:
        folder: where the files go.
        columns: their columns.

    Attributes:
        entries: manifest entries of the closed files.
    """

    def __init__(self, folder: Path, columns: pa.Schema) -> None:
        self.entries: list[FileEntry] = []
        self._folder, self._columns = folder, columns
        self._writer: pq.ParquetWriter | None = None
        self._path = folder
        self._day = 0
        self._held: list[pa.Table] = []
        self._rows = 0
        self._ends = (0, 0)

    def __enter__(self) -> _Days:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, table: pa.Table, times_ms_B: Ints) -> None:
        """Writes rows, none of them earlier than the previous ones."""
        days = times_ms_B // DAY_MS
        for day in sorted(set(days.tolist())):
            low, high = (int(edge) for edge in days.searchsorted([day, day + 1]))
            if self._writer is None or day != self._day:
                self.close()
                self._day = day
                self._path = self._folder / day_file((dt.date(1970, 1, 1) + dt.timedelta(days=day)).isoformat())
                self._writer = pq.ParquetWriter(self._path, self._columns, compression="zstd", write_page_checksum=True)
                self._rows, self._ends = 0, (int(times_ms_B[low]), 0)
            self._held.append(table.slice(low, high - low))
            self._rows += high - low
            self._ends = (self._ends[0], int(times_ms_B[high - 1]))
            if sum(part.num_rows for part in self._held) >= ROW_GROUP:
                self._write()

    def close(self) -> None:
        """Completes the open file."""
        if self._writer is None:
            return
        self._write()
        self._writer.close()
        self._writer = None
        self.entries.append(
            FileEntry(
                path=self._path.name,
                rows=self._rows,
                time_min_ms=self._ends[0],
                time_max_ms=self._ends[1],
                sha256=sha256_of(self._path),
            )
        )

    def _write(self) -> None:
        if self._held and self._writer is not None:
            self._writer.write_table(pa.concat_tables(self._held).combine_chunks(), row_group_size=ROW_GROUP)
            self._held.clear()
