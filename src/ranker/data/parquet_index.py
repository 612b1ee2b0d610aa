"""The index of a folder of Parquet files: which row group contains a row or a time, and how a row group is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.arrow_types import is_number, plain, plain_schema
from ranker.data.checks import check_columns, check_same_ids
from ranker.data.filesystem import SCHEMA_FILE, Root, few, one_line, open_root
from ranker.data.manifest import MANIFEST_FILE, Manifest
from ranker.data.partitions import folder_values, with_columns
from ranker.data.row_faults import Place
from ranker.data.schema import Schema
from ranker.data.times import Ints, check_groups_in_order, check_time_units, times_ms
from ranker.errors import UserError

_READERS = 8
_MANY_GROUPS, _SMALL_GROUP = 1000, 1000  # from as many row groups, and below as many rows each, reading is slow
_UNITS = {"milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ParquetIndex:
    """All row groups that have rows, in time order.

    Attributes:
        root: the folder of the files.
        schema: their schema.
        metadata: the footer of each file, by name.
        from_folders: values of the columns that stand in folder names, by file and column.
        id_types: by column of a categorical feature, ``string`` or ``integer``.
        places: file and number of each row group.
        starts: int64 [G + 1], position of each row group's first row, then the number of all rows.
        time_min_ms: int64 [G], time of each row group's first row, Unix milliseconds.
        time_max_ms: int64 [G], time of each row group's last row, Unix milliseconds.
    """

    root: Root
    schema: Schema
    metadata: dict[str, pq.FileMetaData]
    from_folders: dict[str, dict[str, pa.Scalar]]
    id_types: dict[str, str]
    places: list[Place]
    starts: Ints
    time_min_ms: Ints
    time_max_ms: Ints

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
        return read_group(self.root, place, columns, self.metadata[place.file], self.from_folders[place.file])


def read_group(
    root: Root, place: Place, columns: list[str], metadata: pq.FileMetaData, from_folders: Mapping[str, pa.Scalar]
) -> pa.Table:
    """Reads some columns of a row group. Reads from a remote file system are retried.

    Strings are read as dictionaries, as Parquet stores them, so that each distinct string is processed once. Checksums
    of pages are verified where the file has them.

    Raises:
        UserError: the file is broken, or cannot be read.
    """
    added = [name for name in columns if name in from_folders]
    stored = [name for name in columns if name not in from_folders]
    rows = metadata.row_group(place.row_group).num_rows
    strings = [name for name in dictionary_columns(metadata, place.row_group) if name in stored]

    def read() -> pa.Table:
        with root.filesystem.open_input_file(root.join(place.file)) as source:
            file = pq.ParquetFile(
                source,
                metadata=metadata,
                pre_buffer=True,
                read_dictionary=strings,
                page_checksum_verification=True,
                coerce_int96_timestamp_unit="us",  # in ns, the year 9999 would become 1816
            )
            return file.read_row_group(place.row_group, columns=stored, use_threads=False)

    try:
        table = root.retried(read, what="reading") if stored else pa.table({})
    except (pa.ArrowException, UserError) as error:
        if len(stored) > 1:  # find the broken column
            for column in stored:
                read_group(root, place, [column], metadata, {})
        raise place.error(stored[0], f"{one_line(error)}; if it is broken, write it again") from error
    if stored and table.num_rows != rows:
        raise place.error(stored[0], f"{table.num_rows} rows where the footer says {rows}; write the file again")
    table = plain(table, where=f"{place.file}, row group {place.row_group}")
    return with_columns(table, from_folders, added, rows) if added else table


def dictionary_columns(metadata: pq.FileMetaData, group: int) -> list[str]:
    """Columns of strings that Arrow can read as dictionaries. It cannot where a writer chose a delta encoding."""
    leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    chunks = metadata.row_group(group)
    return [
        leaf.path
        for i, leaf in enumerate(leaves)
        if leaf.logical_type.type == "STRING" and not any("DELTA" in code for code in chunks.column(i).encodings)
    ]


def open_index(url: str, *, schema: Schema | None = None, ordered: bool = True) -> ParquetIndex:
    """The index of a folder.

    Args:
        url: a folder or URL, see ``filesystem.open_root``.
        schema: the schema. Default: ``schema.yaml`` in the folder.
        ordered: as in ``build_index``.

    Raises:
        UserError: as ``build_index``, or there is no schema.
    """
    root = open_root(url)
    if schema is None:
        text = root.read_bytes(SCHEMA_FILE)
        if text is None:
            raise UserError(f"no {SCHEMA_FILE} in {root.url}: a data set needs one beside its Parquet files")
        schema = Schema.from_text(text, source=f"{root.url}/{SCHEMA_FILE}")
    text = root.read_bytes(MANIFEST_FILE)
    manifest = Manifest.from_json(text, where=f"{root.url}/{MANIFEST_FILE}") if text is not None else None
    return build_index(root, schema=schema, manifest=manifest, ordered=ordered)


def build_index(root: Root, *, schema: Schema, manifest: Manifest | None, ordered: bool = True) -> ParquetIndex:
    """Reads the footers of all files in parallel and checks them against the schema and the manifest.

    The order of files is that of their times. Files of the same times are in the order of their names.

    Args:
        root: the folder.
        schema: its schema.
        manifest: its manifest, if it has one.
        ordered: refuse row groups whose times overlap. Without it, the log can be read group by group and not by time.

    Raises:
        UserError: a file is broken or does not match the schema, the other files or the manifest, the times of two
            files overlap or are not plausible, or there are no rows.
    """
    names, passed_over = root.parquet_files()
    if passed_over:
        _LOGGER.warning("%s: passed over %s; only *.parquet files are read", root.url, few(passed_over))
    with ThreadPoolExecutor(_READERS) as pool:
        footers = dict(zip(names, pool.map(lambda name: _footer(root, name), names), strict=True))
    _check_manifest(footers, manifest, root)
    from_folders: dict[str, dict[str, pa.Scalar]] = {}
    columns: dict[str, pa.Schema] = {}
    for name, footer in footers.items():
        stored = plain_schema(footer.schema.to_arrow_schema())
        from_folders[name] = folder_values(name, schema=schema, known=stored.names)
        added = [pa.field(key, value.type) for key, value in from_folders[name].items()]
        columns[name] = pa.schema([*stored, *added])
        check_columns(columns[name], schema=schema, file=name)
    id_types = check_same_ids(columns, schema=schema)
    groups: list[_Group] = []
    for name, footer in footers.items():
        found = _groups(root, name, footer, schema, from_folders[name])
        first, last = min((g.first for g in found), default=0), max((g.last for g in found), default=0)
        groups += [replace(group, file_first=first, file_last=last) for group in found]
    if not groups:
        raise UserError(f"{root.url}: {len(names)} Parquet files without a row; prepare the data again")
    # A stable sort, so that the row groups of a file and files of the same times keep their order.
    groups.sort(key=lambda group: (group.file_first, group.file_last))
    time_min_ms, time_max_ms = np.array([(g.first, g.last) for g in groups], dtype=np.int64).T
    places = [group.place for group in groups]
    _warn_of_constants(footers, schema)
    numbers = np.array([is_number(columns[place.file].field(schema.time_column).type) for place in places])
    check_time_units(
        time_min_ms[numbers],
        time_max_ms[numbers],
        places=[place for place, number in zip(places, numbers, strict=True) if number],
        schema=schema,
    )
    sizes = [group.rows for group in groups]
    if ordered:
        check_groups_in_order(time_min_ms, time_max_ms, places=places, schema=schema, url=root.url)
        _warn_of_small_groups(root, sizes)
    return ParquetIndex(
        root=root,
        schema=schema,
        metadata=footers,
        from_folders=from_folders,
        id_types=id_types,
        places=places,
        starts=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]),
        time_min_ms=time_min_ms,
        time_max_ms=time_max_ms,
    )


@dataclass(frozen=True)
class _Group:
    """A row group with rows: its first and last time, and those of its file, in Unix milliseconds."""

    place: Place
    rows: int
    first: int
    last: int
    file_first: int = 0
    file_last: int = 0


def _groups(
    root: Root,
    name: str,
    footer: pq.FileMetaData,
    schema: Schema,
    from_folders: Mapping[str, pa.Scalar],
) -> list[_Group]:
    found = []
    for number in range(footer.num_row_groups):
        rows = footer.row_group(number).num_rows
        if rows:
            place = Place(file=name, row_group=number)
            found.append(_Group(place, rows, *_time_range(root, place, footer, schema, from_folders)))
    return found


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
    """The only value of a column in all files, ``null`` included. None if it has more, or is not in the footers."""
    seen: Any = None
    for footer in footers.values():
        column = _leaf(footer, name)
        for group in range(footer.num_row_groups if column is not None else 0):
            statistics = footer.row_group(group).column(column).statistics
            rows = footer.row_group(group).num_rows
            if footer.schema.column(column).logical_type.type == "NULL":
                value: Any = "null"
            elif statistics is None:
                return None
            elif statistics.null_count == rows:
                value = "null"
            elif not statistics.has_min_max or statistics.null_count or statistics.min_raw != statistics.max_raw:
                return None
            else:
                value = statistics.min_raw
            seen = value if seen is None else seen
            if rows and value != seen:
                return None
    return seen.decode(errors="replace") if isinstance(seen, bytes) else seen


def _warn_of_small_groups(root: Root, sizes: list[int]) -> None:
    rows = sum(sizes) / len(sizes)
    if len(sizes) >= _MANY_GROUPS and rows < _SMALL_GROUP:
        _LOGGER.warning(
            "%s: %s row groups of %.0f rows on average, which is slow to read (about 1 ms each); write larger ones "
            "with scripts/prepare_data.py rewrite %s NEW_FOLDER",
            root.url,
            f"{len(sizes):,}",
            rows,
            root.url,
        )


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
    root: Root,
    place: Place,
    footer: pq.FileMetaData,
    schema: Schema,
    from_folders: Mapping[str, pa.Scalar],
) -> tuple[int, int]:
    """First and last time of a row group, Unix milliseconds.

    Reads the column only if the footer has no statistics, or if it holds strings, whose order is not always that of
    the times.
    """
    values = _time_statistics(footer, place.row_group, schema.time_column)
    if values is None:
        table = read_group(root, place, [schema.time_column], footer, from_folders)
        values = table[schema.time_column].combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    milliseconds = times_ms(values, schema, place)
    return int(milliseconds.min()), int(milliseconds.max())


def _time_statistics(footer: pq.FileMetaData, group: int, name: str) -> pa.Array | None:
    """Smallest and largest time of a row group, from its statistics. None where they do not tell."""
    leaf = _leaf(footer, name)
    if leaf is None:
        return None
    column, statistics = footer.schema.column(leaf), footer.row_group(group).column(leaf).statistics
    if statistics is None or not statistics.has_min_max or statistics.null_count:
        return None
    if column.logical_type.type == "DECIMAL":  # whose stored numbers lack the decimal point
        return None
    # The stored numbers, because pyarrow makes Python objects of timestamps in ns with pandas only.
    ends = [statistics.min_raw, statistics.max_raw]
    logical = json.loads(column.logical_type.to_json())
    if column.logical_type.type == "TIMESTAMP":
        return pa.array(ends, pa.int64()).cast(pa.timestamp(_UNITS[logical["timeUnit"]]))
    if column.logical_type.type == "DATE":
        return pa.array(ends, pa.int32()).cast(pa.date32())
    if column.physical_type == "DOUBLE":
        return pa.array(ends, pa.float64())
    signed = column.logical_type.type != "INT" or logical["isSigned"]
    return pa.array(ends, pa.int64()) if signed and column.physical_type in ("INT32", "INT64") else None


def _leaf(footer: pq.FileMetaData, column: str) -> int | None:
    """Index of a flat column among the leaves of a footer. None if the column is not stored in the file."""
    return next((i for i in range(footer.num_columns) if footer.schema.column(i).path == column), None)
