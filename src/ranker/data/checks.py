"""Checks of the column types of Parquet files against the schema and against each other."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from ranker.data.arrow_types import id_type, is_list, is_number, value_type
from ranker.data.schema import CategoricalFeature, Schema
from ranker.data.times import is_time
from ranker.errors import UserError, suggest


def check_columns(columns: pa.Schema, *, schema: Schema, file: str) -> None:
    """Checks that a file holds every column of the schema, with a type that can be decoded.

    Raises:
        UserError: a column is missing, there twice, or of the wrong type. The line names file and column, and what to
            do.
    """
    _check_present(columns, schema.columns(), schema, file)
    kinds = {field.name: field.type for field in columns}
    time = kinds[schema.time_column]
    if not is_time(time):
        wanted = "a time is a number, a timestamp, a date or an ISO string"
        if pa.types.is_floating(time):
            wanted = "its digits do not suffice for a time, write it as int64 or float64"
        raise _wrong_type(file, schema.time_column, time, wanted)
    if schema.row_id and not pa.types.is_integer(kinds[schema.row_id]):
        raise _wrong_type(file, schema.row_id, kinds[schema.row_id], "a row id is an integer")
    check_feature_columns(columns, schema=schema, file=file)
    if schema.weight and not is_number(kinds[schema.weight]):
        raise _wrong_type(file, schema.weight, kinds[schema.weight], "a weight is a number")
    for group in schema.groups:
        kind = kinds[group.column]
        if is_list(kind) or (id_type(kind) is None and not pa.types.is_null(kind)):
            raise _wrong_type(file, group.column, kind, f"keys of group '{group.name}' are integers or strings")
    for task in schema.tasks:
        if not is_number(kinds[task.column]):
            raise _wrong_type(file, task.column, kinds[task.column], f"the label of task '{task.name}' is a number")
        if task.mask and not (is_number(kinds[task.mask]) and not pa.types.is_floating(value_type(kinds[task.mask]))):
            raise _wrong_type(file, task.mask, kinds[task.mask], f"the mask of task '{task.name}' is a boolean")


def check_feature_columns(columns: pa.Schema, *, schema: Schema, file: str) -> None:
    """Checks only the columns that a model reads.

    Raises:
        UserError: as ``check_columns``.
    """
    _check_present(columns, schema.feature_columns(), schema, file)
    kinds = {field.name: field.type for field in columns}
    for feature in schema.dense:
        if not is_number(kinds[feature.column]):
            raise _wrong_type(
                file, feature.column, kinds[feature.column], f"dense feature '{feature.name}' is a number"
            )
    for categorical in schema.categorical:
        _check_categorical(kinds[categorical.column], categorical, schema.table_of(categorical), file)


def check_same_ids(files: Mapping[str, pa.Schema], *, schema: Schema) -> dict[str, str]:
    """Checks that the ids of a column are strings in all files or integers in all files.

    An integer and the same number as a string use different embedding rows. Other differences between types do not
    change what a model sees: the width of integers and floats, string or large_string, the unit or zone of a timestamp.

    Args:
        files: the columns of each file.
        schema: gives the features.

    Returns:
        By column, ``string`` or ``integer``. A column that is null in all files is left out.

    Raises:
        UserError: a column holds strings in one file and integers in another.
    """
    seen: dict[str, tuple[str, str]] = {}
    ids = {feature.column for feature in schema.categorical}
    for file, columns in files.items():
        for name in ids | {group.column for group in schema.groups}:
            here = id_type(columns.field(name).type)
            if here is None:
                continue
            kind, first = seen.setdefault(name, (here, file))
            if kind != here:
                raise UserError(
                    f"{file}: the ids in column '{name}' are {here}s, but {kind}s in {first}, so the same id would use "
                    "two embedding rows; write all files of a log with one type"
                )
    return {name: kind for name, (kind, _) in seen.items() if name in ids}


def check_id_types(columns: pa.Schema, known: Mapping[str, str], *, schema: Schema, file: str) -> None:
    """Checks that ids to be scored have the type of the ids that the model was trained on.

    Args:
        columns: columns of the file to be scored.
        known: by column, ``string`` or ``integer``. Columns that are not in it are not checked.
        schema: gives the features.
        file: the file, for errors.

    Raises:
        UserError: a type differs. The same id would use another embedding row, and the scores would be wrong.
    """
    for feature in schema.categorical:
        trained = known.get(feature.column)
        here = id_type(columns.field(feature.column).type)
        if trained and here and here != trained:
            raise UserError(
                f"{file}: the ids in column '{feature.column}' are {here}s, but the model was trained on {trained}s, "
                f"and the same id would have another embedding: write the column as {trained}s"
            )


def _check_present(columns: pa.Schema, wanted: list[str], schema: Schema, file: str) -> None:
    for name in wanted:
        count = columns.names.count(name)
        if count == 0:
            known = suggest(name, columns.names)
            raise UserError(f"{file}: column '{name}' of schema '{schema.name}' is missing; {known}")
        if count > 1:
            raise UserError(f"{file}: column '{name}' is there {count} times; write each column once")


def _check_categorical(kind: pa.DataType, feature: CategoricalFeature, owner: CategoricalFeature, file: str) -> None:
    if pa.types.is_null(kind):  # no id in the whole file
        return
    if is_list(kind) != (feature.kind != "one_hot"):
        wanted = "one id" if feature.kind == "one_hot" else "a list of ids"
        raise _wrong_type(file, feature.column, kind, f"{feature.kind} feature '{feature.name}' has {wanted} per row")
    held = id_type(kind)
    if held is None:
        if is_list(kind) and pa.types.is_null(kind.value_type):
            return
        raise _wrong_type(file, feature.column, kind, f"ids of '{feature.name}' are integers or strings")
    if held == "string" and owner.num_embeddings:
        raise _wrong_type(
            file,
            feature.column,
            kind,
            f"strings of '{feature.name}' need hash_buckets or a vocabulary, not num_embeddings",
        )
    if owner.vocabulary and any(isinstance(word, str) != (held == "string") for word in owner.vocabulary):
        raise _wrong_type(file, feature.column, kind, f"the vocabulary of '{owner.name}' has another type")


def _wrong_type(file: str, column: str, kind: pa.DataType, wanted: str) -> UserError:
    return UserError(f"{file}: column '{column}' is {kind}; {wanted}: correct the schema or the file")
