"""The parts of a schema: features and tasks, how they are read from plain data, and how they are written as such."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from ranker.errors import UserError, one_of, suggest

Transform = Literal["none", "log1p"]
TRANSFORMS: tuple[Transform, ...] = ("none", "log1p")
KINDS = ("one_hot", "multi_hot", "sequence")
TASK_TYPES = ("binary", "regression")

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class DenseFeature:
    """One number per row. Value used: ``transform(scale * x)``; log1p is signed, ``sign(x) * log(1 + |x|)``.

    Attributes:
        name: the feature's name.
        column: the Parquet column. Default: the name.
        transform: ``none`` or ``log1p``. Both depend on the value alone, so neither uses later rows.
        scale: factor applied first, for example 1e-3 to convert milliseconds to seconds.
        fill_null: the raw value used for null. Without it, a null is an error.
    """

    name: str
    column: str = ""
    transform: Transform = "none"
    scale: float = 1.0
    fill_null: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "column", self.column or self.name)
        one_of(self.transform, TRANSFORMS, f"dense feature '{self.name}': transform")


@dataclass(frozen=True, kw_only=True)
class CategoricalFeature:
    """One id (``one_hot``) or a list of ids (``multi_hot``, ``sequence``) per row, embedded and mean-pooled.

    Exactly one of num_embeddings, hash_buckets, vocabulary and table defines how an id maps to a row of the embedding
    table. Row 0 always stands for null and for unknown ids, so a table has one row more than the number given here.

    Attributes:
        name: the feature's name.
        column: the Parquet column. Default: the name.
        kind: ``one_hot`` (integer or string column), ``multi_hot`` or ``sequence`` (list columns).
        num_embeddings: ids are 0 .. n-1 and use row id + 1.
        hash_buckets: ids are any int64 (or string) and use row 1 + hash(id) mod n.
        vocabulary: the known strings or integers, in order. The i-th uses row i + 1, all others row 0.
        embedding_dim: D, width of the embedding.
        max_length: a sequence keeps its last (most recent) max_length ids. 0 keeps all.
        table: name of another categorical feature whose table (and id mapping) this one shares.
    """

    name: str
    column: str = ""
    kind: Literal["one_hot", "multi_hot", "sequence"] = "one_hot"
    num_embeddings: int = 0
    hash_buckets: int = 0
    vocabulary: tuple[str | int, ...] = ()
    embedding_dim: int = 8
    max_length: int = 0
    table: str = ""

    def __post_init__(self) -> None:
        where = f"categorical feature '{self.name}'"
        object.__setattr__(self, "column", self.column or self.name)
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        one_of(self.kind, KINDS, f"{where}: kind")
        given = sum([self.num_embeddings > 0, self.hash_buckets > 0, bool(self.vocabulary), bool(self.table)])
        if given != 1:
            raise UserError(f"{where}: give exactly one of num_embeddings, hash_buckets, vocabulary, table")
        if self.embedding_dim < 1:
            raise UserError(f"{where}: embedding_dim must be at least 1, got {self.embedding_dim}")

    @property
    def rows(self) -> int:
        """Rows of its own embedding table, including the one for unknown ids. 0 if it shares a table."""
        size = self.num_embeddings or self.hash_buckets or len(self.vocabulary)
        return size + 1 if size else 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One quantity to predict. Label used: ``transform(scale * y)``.

    Attributes:
        name: the task's name.
        type: ``binary`` (label 0 or 1, log loss, AUC) or ``regression`` (squared loss, RMSE).
        column: the Parquet column. Default: the name.
        transform: ``none`` or ``log1p`` of the scaled label (regression only).
        scale: factor applied to the label before the transform (regression only).
        mask: an optional boolean column. A row counts for this task where it is true. A null label never counts.
        weight: weight of this task's loss in the sum.
        at_least: makes a number a binary label, 1 where the column is at least this (binary only).
    """

    name: str
    type: Literal["binary", "regression"] = "binary"
    column: str = ""
    transform: Transform = "none"
    scale: float = 1.0
    mask: str = ""
    weight: float = 1.0
    at_least: float | None = None

    def __post_init__(self) -> None:
        where = f"task '{self.name}'"
        object.__setattr__(self, "column", self.column or self.name)
        one_of(self.type, TASK_TYPES, f"{where}: type")
        one_of(self.transform, TRANSFORMS, f"{where}: transform")
        if self.type == "binary" and (self.transform != "none" or self.scale != 1.0):
            raise UserError(f"{where}: transform and scale are for regression; use at_least on a binary task")
        if self.type == "regression" and self.at_least is not None:
            raise UserError(f"{where}: at_least is for binary tasks")
        if not self.weight > 0:
            raise UserError(f"{where}: weight must be above 0, got {self.weight}; leave the task out instead")


def from_plain(kind: type[_T], raw: object, where: str) -> _T:
    """Makes a dataclass from a mapping.

    Args:
        kind: the dataclass.
        raw: the value read from YAML.
        where: name of the value, the start of an error line.

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
    return kind(**{key: _checked(raw[key], str(fields[key].type), f"{where}: {key}") for key in raw})


def _checked(value: Any, annotation: str, where: str) -> Any:
    """Checks a YAML scalar against the annotation. A whole number is accepted where a float is expected."""
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


def to_plain(entry: Any) -> dict[str, Any]:
    """A dataclass as a mapping, without default values and without a column that has its feature's name."""
    plain = {}
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if value != field.default and not (field.name == "column" and value == entry.name):
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain
