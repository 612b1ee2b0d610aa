"""Kinds of Arrow types: which types of different files are the same to a model."""

from __future__ import annotations

import pyarrow as pa

from ranker.errors import UserError


def is_string(kind: pa.DataType) -> bool:
    """True for each of Arrow's string types."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    """True for each of Arrow's list types."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_number(kind: pa.DataType) -> bool:
    """True for integers, floats and booleans, and for a column that is null throughout."""
    kind = value_type(kind)
    return any(
        test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    )


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of a dictionary's values, or the type itself."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def id_type(kind: pa.DataType) -> str | None:
    """What a column of ids, or of lists of ids, holds: ``string`` or ``integer``.

    None for any other type, and for a column that is null throughout, which fits both.
    """
    kind = value_type(kind.value_type if is_list(kind) else kind)
    if is_string(kind):
        return "string"
    return "integer" if pa.types.is_integer(kind) or pa.types.is_boolean(kind) else None


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type as which a column is read. Decimals and binaries are what Spark, Hive and Impala write.

    A decimal without fraction is an integer (a 64-bit unsigned integer of Spark is ``decimal(20, 0)``), one with a
    fraction a float64. A binary column holds the bytes of strings.
    """
    if pa.types.is_decimal(kind):
        return pa.int64() if kind.scale <= 0 else pa.float64()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.large_string()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, plain_type(kind.value_type))
    if is_list(kind) and not kind.value_type.equals(plain_type(kind.value_type)):
        return pa.large_list(plain_type(kind.value_type))
    return kind


def plain_schema(columns: pa.Schema) -> pa.Schema:
    """The columns with the types as which they are read."""
    return pa.schema([pa.field(field.name, plain_type(field.type)) for field in columns])


def plain(table: pa.Table, *, where: str) -> pa.Table:
    """The table with the types of ``plain_type``.

    Args:
        table: some columns of a file.
        where: its file, for errors.

    Raises:
        UserError: a decimal does not fit 64 bits, or a binary is no UTF-8.
    """
    for number, field in enumerate(table.schema):
        kind = plain_type(field.type)
        if kind.equals(field.type):
            continue
        try:
            table = table.set_column(number, field.name, table.column(number).cast(kind))
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{where}: column '{field.name}' ({field.type}) cannot be read as {kind}: {error}; write it as int64, "
                "float64 or string"
            ) from error
    return table
