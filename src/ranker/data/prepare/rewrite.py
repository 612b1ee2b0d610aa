"""Rewrites a log of Parquet files, in any order, as one file per UTC day with large row groups and a manifest.

Rows that are not in time order are sorted with memory for BUCKET_ROWS rows, as in ``days``: written to one file, dealt
out into buckets of whole minutes, and sorted bucket by bucket.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.atomic import locked, replacing_folder
from ranker.data.arrow_types import plain_schema, value_type
from ranker.data.filesystem import one_line
from ranker.data.manifest import FileEntry, Manifest, day_file, sha256_of
from ranker.data.parquet_index import ParquetIndex, open_index
from ranker.data.prepare.buckets import Step, bucket_starts, count_slots, deal
from ranker.data.prepare.days import ROW_GROUP
from ranker.data.schema import SCHEMA_FILE
from ranker.data.times import DAY_MS, Ints, times_ms
from ranker.errors import UserError

POSITION, MOMENT = "__position", "__time_ms"  # columns of the staged rows beside those of the log


def rewrite(source: str, destination: str | Path, *, step: Step) -> Manifest:
    """Writes the rows of a log in time order into a new folder. Rows of the same time keep their order.

    Only the columns of the schema are kept. Columns that stand in folder names become columns of the files. Where the
    types of files differ, the widest is used. The times become timestamps in ms, UTC, unless they are a feature too.

    Args:
        source: folder or URL of the log.
        destination: folder to create.
        step: progress bar, as of :func:`write_days`.

    Raises:
        UserError: the log cannot be read, its types cannot be joined, or the destination is not empty.
    """
    index = open_index(source, ordered=False)
    target = Path(destination).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; name a new folder")
    columns = _common_columns(index)
    with locked(target), replacing_folder(target) as draft, _Days(draft, columns) as days:
        with step("reading times", index.rows) as advance:
            counts, in_order = _times(index, advance)
        if in_order:
            with step("writing", index.rows) as advance:
                for table, times in _groups(index, columns, advance):
                    days.add(table, times)
        else:
            with tempfile.TemporaryDirectory(dir=draft, prefix="staging-") as staging:
                for table, times in _sorted(index, columns, counts, Path(staging), step):
                    days.add(table, times)
        days.close()
        index.schema.to_yaml(draft / SCHEMA_FILE)
        manifest = Manifest(
            files=tuple(days.entries), source={"kind": "rewrite", "source": str(source), "sorted": not in_order}
        )
        manifest.write(draft)
    return manifest


def _times(index: ParquetIndex, advance: Callable[[int], object]) -> tuple[dict[int, int], bool]:
    """Rows of each slot, ascending, and whether the rows are in time order already. Reads the time column alone."""
    counts: Counter[int] = Counter()
    in_order, last = True, -(2**63)
    for group in range(len(index.places)):
        times = _times_of(index, group, index.read(group, [index.schema.time_column]))
        in_order = in_order and last <= times[0] and bool((times[1:] >= times[:-1]).all())
        last = int(times[-1])
        count_slots(times, counts)
        advance(len(times))
    return dict(sorted(counts.items())), in_order


def _times_of(index: ParquetIndex, group: int, table: pa.Table) -> Ints:
    column = table[index.schema.time_column].combine_chunks()
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    return times_ms(column, index.schema, index.places[group])


def _groups(
    index: ParquetIndex, columns: pa.Schema, advance: Callable[[int], object]
) -> Iterator[tuple[pa.Table, Ints]]:
    """The rows of each row group with the columns of the new files, and their times."""
    name = index.schema.time_column
    for group in range(len(index.places)):
        table = index.read(group, index.schema.columns())
        times = _times_of(index, group, table)
        if name not in index.schema.feature_columns():
            moments = pa.array(times).cast(columns.field(name).type)
            table = table.set_column(table.column_names.index(name), name, moments)
        yield table.select(columns.names).cast(columns), times
        advance(table.num_rows)


def _sorted(
    index: ParquetIndex, columns: pa.Schema, counts: Mapping[int, int], staging: Path, step: Step
) -> Iterator[tuple[pa.Table, Ints]]:
    """All rows in time order, a bucket at a time."""
    raw, position = staging / "raw.parquet", 0
    extra = [pa.field(MOMENT, pa.int64()), pa.field(POSITION, pa.int64())]
    with step("reading", index.rows) as advance, pq.ParquetWriter(raw, pa.schema([*columns, *extra])) as writer:
        for table, times in _groups(index, columns, advance):
            positions = pa.array(np.arange(position, position + len(times)))
            writer.write_table(table.append_column(extra[0], pa.array(times)).append_column(extra[1], positions))
            position += len(times)
    buckets = deal([raw], bucket_starts(counts), staging, time=MOMENT, total=index.rows, step=step)
    with step("sorting and writing", index.rows) as advance:
        for files in buckets:
            table = pa.concat_tables(pq.read_table(file) for file in files)
            table = table.sort_by([(MOMENT, "ascending"), (POSITION, "ascending")])
            for file in files:
                file.unlink()
            yield table.select(columns.names), table[MOMENT].to_numpy()
            advance(table.num_rows)


def _common_columns(index: ParquetIndex) -> pa.Schema:
    """The columns of the schema with types that hold the values of all files."""
    schema, files = index.schema, []
    for file, footer in index.metadata.items():
        stored = plain_schema(footer.schema.to_arrow_schema())
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
