"""Dataclasses from plain data and back, with errors that say which key of which file is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from ranker.errors import UserError, suggest

_T = TypeVar("_T")


def one_of(value: object, options: Sequence[str], where: str) -> None:
    """Refuses a word that is none of the options.

    Raises:
        UserError: it is not; the line names the nearest.
    """
    if value not in options:
        raise UserError(f"{where} '{value}' is unknown; {suggest(str(value), options)}")


def build(kind: type[_T], raw: object, where: str) -> _T:
    """A dataclass from a mapping.

    Args:
        kind: the dataclass.
        raw: what was read from YAML.
        where: what to call it in an error.

    Raises:
        UserError: a key is unknown, missing or of the wrong type.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected a mapping, got {raw!r}")
    fields = {f.name: f for f in dataclasses.fields(cast(Any, kind))}
    for key in raw:
        if key not in fields:
            raise UserError(f"{where}: unknown key '{key}'; {suggest(str(key), fields)}")
    for name, field in fields.items():
        if name not in raw and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: '{name}' is missing")
    clean = {key: _coerce(raw[key], str(fields[key].type), f"{where}: {key}") for key in raw}
    return kind(**clean)


def _coerce(value: Any, annotation: str, where: str) -> Any:
    """Checks a YAML scalar against the annotation; a whole number is fine where a float is asked for."""
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "float | None": (int, float, type(None)),
    }
    expected = kinds.get(annotation)
    if expected is not None and (not isinstance(value, expected) or isinstance(value, bool)):
        raise UserError(f"{where} must be {annotation}, got {value!r}")
    return float(value) if annotation.startswith("float") and value is not None else value


def without_defaults(entry: Any) -> dict[str, Any]:
    """A dataclass as a mapping, without what needs no saying: defaults, and a column called as its feature."""
    plain = {}
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if value != field.default and not (field.name == "column" and value == entry.name):
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain
