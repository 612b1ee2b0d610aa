"""The index of a folder of Parquet files: which row group contains a row or a time, and how a row group is read."""

from __future__ import annotations

import datetime as dt
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.checks import check_columns, check_groups_in_order, check_same_types, check_time_unit
from ranker.data.decode import times_ms
from ranker.data.filesystem import Root, one_line
from ranker.data.manifest import Manifest
from ranker.data.row_faults import Place
from ranker.data.schema import Schema
from ranker.errors import UserError

_READERS = 8
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ParquetIndex:
    """All row groups that have rows, in time order.

    Attributes:
        root: the folder of the files.
        schema: their schema.
        metadata: the footer of each file, by name.
        places: file and number of each row group.
        starts: int64 [G + 1], position of each row group's first row, then the number of all rows.
        time_min_ms: int64 [G], time of each row group's first row, Unix milliseconds.
        time_max_ms: int64 [G], time of each row group's last row, Unix milliseconds.
    """

    root: Root
    schema: Schema
    metadata: dict[str, pq.FileMetaData]
    places: list[Place]
    starts: npt.NDArray[np.int64]
    time_min_ms: npt.NDArray[np.int64]
    time_max_ms: npt.NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return int(self.starts[-1])

    def group_of_row(self, row: int) -> int:
        """Number of the row group that contains a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def group_of_time(self, time_ms: int) -> int:
        """Number of the first row group that ends at or after a time. The number of row groups if none does."""
        return int(np.searchsorted(self.time_max_ms, time_ms, side="left"))

    def read(self, group: int, columns: list[str]) -> pa.Table:
        """Reads some columns of a row group.

        Raises:
            UserError: the file is broken, or cannot be read.
        """
        place = self.places[group]
        return read_group(self.root, place, columns, self.metadata[place.file])


def read_group(root: Root, place: Place, columns: list[str], metadata: pq.FileMetaData) -> pa.Table:
    """Reads some columns of a row group. Reads from a remote file system are retried.

    Strings are read as dictionaries, as Parquet stores them, so that each distinct string is processed once.

    Raises:
        UserError: the file is broken, or cannot be read.
    """
    leaves = (metadata.schema.column(i) for i in range(metadata.num_columns))
    strings = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING" and leaf.path in columns]

    def read() -> pa.Table:
        with root.filesystem.open_input_file(root.join(place.file)) as source:
            file = pq.ParquetFile(source, metadata=metadata, pre_buffer=True, read_dictionary=strings)
            return file.read_row_group(place.row_group, columns=columns, use_threads=False)

    try:
        return root.retried(read, what="reading")
    except (pa.ArrowException, UserError) as error:
        if len(columns) > 1:  # find the broken column
            for column in columns:
                read_group(root, place, [column], metadata)
        raise place.error(columns[0], f"{one_line(error)}; if it is broken, write it again") from error


def build_index(root: Root, *, schema: Schema, manifest: Manifest | None) -> ParquetIndex:
    """Reads the footers of all files in parallel and checks them against the schema and the manifest.

    Raises:
        UserError: a file is broken or does not match the schema, the other files or the manifest, the files are not in
            time order, or there are no rows.
    """
    names = root.parquet_files()
    with ThreadPoolExecutor(_READERS) as pool:
        footers = dict(zip(names, pool.map(lambda name: _footer(root, name), names), strict=True))
    _check_manifest(footers, manifest, root)
    first = footers[names[0]].schema.to_arrow_schema()
    places: list[Place] = []
    sizes: list[int] = []
    times: list[tuple[int, int]] = []
    for name, footer in footers.items():
        columns = footer.schema.to_arrow_schema()
        check_columns(columns, schema=schema, file=name)
        check_same_types(columns, first, schema=schema, file=name, first_file=names[0])
        column = _leaf(footer, schema.time_column)
        for group in range(footer.num_row_groups):
            rows = footer.row_group(group).num_rows
            if rows:
                place = Place(file=name, row_group=group)
                places.append(place)
                sizes.append(rows)
                times.append(_time_range(root, place, footer, column, columns, schema))
    if not places:
        raise UserError(f"{root.url}: {len(names)} Parquet files without a row; prepare the data again")
    time_min_ms, time_max_ms = np.array(times, dtype=np.int64).T
    _warn_of_constants(footers, schema)
    check_time_unit(int(time_min_ms[0]), schema=schema, file=places[0].file)
    check_groups_in_order(time_min_ms, time_max_ms, places=places, schema=schema)
    return ParquetIndex(
        root=root,
        schema=schema,
        metadata=footers,
        places=places,
        starts=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]),
        time_min_ms=time_min_ms,
        time_max_ms=time_max_ms,
    )


def _footer(root: Root, name: str) -> pq.FileMetaData:
    def read() -> pq.FileMetaData:
        with root.filesystem.open_input_file(root.join(name)) as source:
            return pq.read_metadata(source)

    try:
        return root.retried(read, what=f"{root.join(name)}: reading the footer")
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{root.join(name)} is not a Parquet file, or is truncated ({one_line(error)}); write it again"
        ) from error


def constant_columns(footers: dict[str, pq.FileMetaData], schema: Schema) -> list[str]:
    """Features and labels with one value in all files, according to the footers, each with that value."""
    lists = {feature.column for feature in schema.ragged}
    found = {name: _constant(footers, name) for name in schema.columns() if name not in lists}
    return [f"'{name}' (always {value})" for name, value in found.items() if value is not None]


def _warn_of_constants(footers: dict[str, pq.FileMetaData], schema: Schema) -> None:
    columns = ", ".join(constant_columns(footers, schema))
    if columns:
        _LOGGER.warning("schema '%s' names columns from which nothing can be learned: %s", schema.name, columns)


def _constant(footers: dict[str, pq.FileMetaData], name: str) -> Any:
    """The only value of a column in all files. None if it has more, or nulls, or the footers have no statistics."""
    seen: Any = None
    for footer in footers.values():
        column = _leaf(footer, name)
        for group in range(footer.num_row_groups):
            statistics = footer.row_group(group).column(column).statistics
            if statistics is None or not statistics.has_min_max or statistics.null_count:
                return None
            seen = statistics.min if seen is None else seen
            if not statistics.min == statistics.max == seen:
                return None
    return seen


def _check_manifest(footers: dict[str, pq.FileMetaData], manifest: Manifest | None, root: Root) -> None:
    if manifest is None:
        return
    promised = {entry.path: entry.rows for entry in manifest.files}
    for name, rows in promised.items():
        if name not in footers:
            raise UserError(f"{root.url}: {name} is in the manifest but missing; prepare the data again")
        if footers[name].num_rows != rows:
            raise UserError(
                f"{root.join(name)} has {footers[name].num_rows} rows where the manifest says {rows}; prepare it again"
            )
    for name in footers:
        if name not in promised:
            raise UserError(f"{root.join(name)} is not in the manifest; move it away or prepare the data again")


def _time_range(
    root: Root, place: Place, footer: pq.FileMetaData, column: int, columns: pa.Schema, schema: Schema
) -> tuple[int, int]:
    """First and last time of a row group, Unix milliseconds. Reads the column only if the footer has no statistics."""
    statistics = footer.row_group(place.row_group).column(column).statistics
    kind = columns.field(schema.time_column).type
    if statistics is not None and statistics.has_min_max:
        ends = [statistics.min, statistics.max]
        if isinstance(ends[0], dt.datetime):
            ends = [moment.replace(tzinfo=moment.tzinfo or dt.UTC) for moment in ends]
            kind = pa.timestamp(kind.unit, tz="UTC")
        values = pa.array(ends, kind)
    else:
        values = read_group(root, place, [schema.time_column], footer)[schema.time_column].combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    milliseconds = times_ms(values, schema, place)
    return int(milliseconds.min()), int(milliseconds.max())


def _leaf(footer: pq.FileMetaData, column: str) -> int:
    """Index of a flat column among the leaves of a footer."""
    return next(i for i in range(footer.num_columns) if footer.schema.column(i).path == column)
