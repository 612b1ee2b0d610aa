"""Columns that stand in folder names instead of in the files: ``country=de/part-0.parquet`` (Hive's layout)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import unquote

import pyarrow as pa

from ranker.data.schema import Schema
from ranker.errors import UserError

_NULL = "__HIVE_DEFAULT_PARTITION__"  # Hive's name of the folder for null


def folder_values(file: str, *, schema: Schema, known: Iterable[str]) -> dict[str, pa.Scalar]:
    """The values that the folders of a file give to columns of the schema, by column.

    The type follows from the schema and not from the values, so that it stays the same when a folder is added.

    Args:
        file: path within the log, with forward slashes.
        schema: its columns. Other keys of folders are ignored.
        known: columns of the file itself. They win over folders.

    Raises:
        UserError: a value does not have the type that the schema needs.
    """
    wanted = set(schema.columns()) - set(known)
    found: dict[str, pa.Scalar] = {}
    for part in file.split("/")[:-1]:
        name, equals, text = part.partition("=")
        name, text = unquote(name), unquote(text)
        if equals and name in wanted:
            kind = _type_of(name, text, schema)
            try:
                found[name] = pa.scalar(None if text == _NULL else text, pa.string()).cast(kind)
            except pa.ArrowInvalid as error:
                raise UserError(f"{file}: '{text}' in the name of a folder is no {kind} for column '{name}'") from error
    return found


def with_columns(table: pa.Table, values: Mapping[str, pa.Scalar], names: Iterable[str], rows: int) -> pa.Table:
    """The table with constant columns of some of the folder values.

    Args:
        table: the columns of the file.
        values: from ``folder_values``.
        names: the columns to add.
        rows: number of rows, because the table may have no column.
    """
    columns = dict(zip(table.column_names, table.columns, strict=True))
    return pa.table(columns | {name: pa.repeat(values[name], rows) for name in names})


def _type_of(name: str, text: str, schema: Schema) -> pa.DataType:
    if name == schema.time_column:
        return pa.int64() if text.lstrip("-").isdigit() else pa.string()
    for feature in schema.categorical:
        if feature.column == name:
            words = schema.table_of(feature).vocabulary
            strings = isinstance(words[0], str) if words else bool(schema.table_of(feature).hash_buckets)
            return pa.string() if strings else pa.int64()
    if any(group.column == name for group in schema.groups):
        return pa.string()
    return pa.int64() if name in (schema.row_id, *(task.mask for task in schema.tasks)) else pa.float64()
