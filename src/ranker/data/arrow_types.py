"""Kinds of Arrow types: which types of different files are the same to a model."""

from __future__ import annotations

import pyarrow as pa


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
