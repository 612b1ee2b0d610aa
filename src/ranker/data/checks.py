"""Checks of Parquet files against the schema: column types before reading, order and unit of times afterwards."""

from __future__ import annotations

import datetime as dt

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ranker.data.decode import is_string
from ranker.data.row_faults import Place
from ranker.data.schema import TIME_UNITS, CategoricalFeature, Schema
from ranker.errors import UserError, suggest

# A time outside of these years has the wrong unit if another unit would put it inside.
_SANE_MS = tuple(int(dt.datetime(year, 1, 1, tzinfo=dt.UTC).timestamp() * 1000) for year in (1990, 2100))


def check_columns(columns: pa.Schema, *, schema: Schema, file: str) -> None:
    """Checks that a file holds every column of the schema, with a type that can be decoded.

    Raises:
        UserError: a column is missing or of the wrong type. The line names file and column, and what to do.
    """
    kinds = {field.name: field.type for field in columns}
    _check_present(kinds, schema.columns(), schema, file)
    time = kinds[schema.time_column]
    if not (_is_number(time) or pa.types.is_timestamp(time)):
        raise _wrong_type(file, schema.time_column, time, "a time is a number or a timestamp")
    if schema.row_id and not pa.types.is_integer(kinds[schema.row_id]):
        raise _wrong_type(file, schema.row_id, kinds[schema.row_id], "a row id is an integer")
    check_feature_columns(columns, schema=schema, file=file)
    for task in schema.tasks:
        if not _is_number(kinds[task.column]):
            raise _wrong_type(file, task.column, kinds[task.column], f"the label of task '{task.name}' is a number")
        if task.mask and not (pa.types.is_boolean(kinds[task.mask]) or pa.types.is_integer(kinds[task.mask])):
            raise _wrong_type(file, task.mask, kinds[task.mask], f"the mask of task '{task.name}' is a boolean")


def check_feature_columns(columns: pa.Schema, *, schema: Schema, file: str) -> None:
    """Checks only the columns that a model reads.

    Raises:
        UserError: as ``check_columns``.
    """
    kinds = {field.name: field.type for field in columns}
    _check_present(kinds, schema.feature_columns(), schema, file)
    for feature in schema.dense:
        if not _is_number(kinds[feature.column]):
            raise _wrong_type(
                file, feature.column, kinds[feature.column], f"dense feature '{feature.name}' is a number"
            )
    for categorical in schema.categorical:
        _check_categorical(kinds[categorical.column], categorical, schema.table_of(categorical), file)


def check_same_types(columns: pa.Schema, first: pa.Schema, *, schema: Schema, file: str, first_file: str) -> None:
    """Checks that a file's columns have the same types as in the log's first file.

    Raises:
        UserError: a column's type differs.
    """
    for name in schema.columns():
        here, there = columns.field(name).type, first.field(name).type
        if here != there:
            raise UserError(
                f"{file}: column '{name}' is {here}, but {there} in {first_file}; "
                "write all files of a log with the same types"
            )


def check_time_unit(first_ms: int, *, schema: Schema, file: str) -> None:
    """Checks that times are plausible in the schema's unit.

    Args:
        first_ms: a time of the log, in milliseconds if the schema's unit is right.
        schema: gives the time column and its unit.
        file: the file that contains the time.

    Raises:
        UserError: the time lies outside of 1990 .. 2100, and another unit would put it inside.
    """
    low, high = _SANE_MS
    if low <= first_ms < high:
        return
    raw = first_ms / TIME_UNITS[schema.time_unit]
    for unit, factor in TIME_UNITS.items():
        if low <= raw * factor < high:
            raise UserError(
                f"{file}: column '{schema.time_column}' ({raw:.0f}) is not in 1990 .. 2100 in '{schema.time_unit}', "
                f"but is in '{unit}'; set time_unit: {unit} in the schema"
            )


def check_sorted(time_ms_B: npt.NDArray[np.int64], *, schema: Schema, place: Place) -> None:
    """Checks that the rows of a row group are in time order.

    Raises:
        UserError: a row is earlier than the one before it. The line names the first such row.
    """
    earlier = np.flatnonzero(time_ms_B[1:] < time_ms_B[:-1])
    if len(earlier):
        row = int(earlier[0]) + 1
        raise place.error(
            schema.time_column, f"row {row} is earlier than the row before it; sort the log by '{schema.time_column}'"
        )


def check_groups_in_order(
    time_min_ms: npt.NDArray[np.int64], time_max_ms: npt.NDArray[np.int64], *, places: list[Place], schema: Schema
) -> None:
    """Checks that no row group begins before the previous one ends, over all files.

    Raises:
        UserError: one does.
    """
    early = np.flatnonzero(time_min_ms[1:] < time_max_ms[:-1])
    if len(early):
        here, before = places[early[0] + 1], places[early[0]]
        raise here.error(
            schema.time_column,
            f"begins before row group {before.row_group} of {before.file} ends; sort the log by "
            f"'{schema.time_column}' and name its files so that the order of names is time order",
        )


def _check_present(kinds: dict[str, pa.DataType], wanted: list[str], schema: Schema, file: str) -> None:
    for name in wanted:
        if name not in kinds:
            raise UserError(f"{file}: column '{name}' of schema '{schema.name}' is missing; {suggest(name, kinds)}")


def _check_categorical(kind: pa.DataType, feature: CategoricalFeature, owner: CategoricalFeature, file: str) -> None:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if lists != (feature.kind != "one_hot"):
        wanted = "one id" if feature.kind == "one_hot" else "a list of ids"
        raise _wrong_type(file, feature.column, kind, f"{feature.kind} feature '{feature.name}' has {wanted} per row")
    item = kind.value_type if lists else kind
    item = item.value_type if pa.types.is_dictionary(item) else item
    strings = is_string(item)
    if not (strings or pa.types.is_integer(item) or pa.types.is_boolean(item)):
        raise _wrong_type(file, feature.column, kind, f"ids of '{feature.name}' are integers or strings")
    if strings and owner.num_embeddings:
        raise _wrong_type(
            file,
            feature.column,
            kind,
            f"strings of '{feature.name}' need hash_buckets or a vocabulary, not num_embeddings",
        )
    if owner.vocabulary and any(isinstance(word, str) != strings for word in owner.vocabulary):
        raise _wrong_type(file, feature.column, kind, f"the vocabulary of '{owner.name}' has another type")


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _wrong_type(file: str, column: str, kind: pa.DataType, wanted: str) -> UserError:
    return UserError(f"{file}: column '{column}' is {kind}; {wanted}: correct the schema or the file")
