"""The parts of a schema: features and tasks, how they are read from plain data, and how they are written as such."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from ranker.errors import UserError, one_of, suggest

Transform = Literal["none", "log1p"]
TRANSFORMS: tuple[Transform, ...] = ("none", "log1p")
KINDS = ("one_hot", "multi_hot", "sequence")
TASK_TYPES = ("binary", "regression")
LARGEST = 3e38  # of float32, in which features and labels are computed

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
        where = f"dense feature '{self.name}'"
        one_of(self.transform, TRANSFORMS, f"{where}: transform")
        _check_scale(self.scale, where)
        if self.fill_null is not None:
            _check_finite(self.fill_null, f"{where}: fill_null")
            _check_finite(self.fill_null * self.scale, f"{where}: scale * fill_null")


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
        admit_after: an id uses a row of its own from the time on that training sees this row for the k-th time, and row
            0 before. 0: always.
        evict_after_days: a row that training has not seen for so many days of the log's time starts anew when it occurs
            again: weights, accumulators and count. 0: never.
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
    admit_after: int = 0
    evict_after_days: float = 0.0

    def __post_init__(self) -> None:
        where = f"categorical feature '{self.name}'"
        object.__setattr__(self, "column", self.column or self.name)
        one_of(self.kind, KINDS, f"{where}: kind")
        object.__setattr__(self, "vocabulary", _checked_vocabulary(self.vocabulary, where))
        for name in ("num_embeddings", "hash_buckets", "max_length"):
            if getattr(self, name) < 0:
                raise UserError(f"{where}: {name} must be 0 (none) or more, got {getattr(self, name)}")
        given = sum([self.num_embeddings > 0, self.hash_buckets > 0, bool(self.vocabulary), bool(self.table)])
        if given != 1:
            raise UserError(f"{where}: give exactly one of num_embeddings, hash_buckets, vocabulary, table")
        if self.embedding_dim < 1:
            raise UserError(f"{where}: embedding_dim must be at least 1, got {self.embedding_dim}")
        if not 0 <= self.admit_after <= 2**30:
            raise UserError(f"{where}: admit_after must be a number from 0 (always) to 2^30, got {self.admit_after}")
        if not 0 <= self.evict_after_days <= 100_000:
            raise UserError(f"{where}: evict_after_days must be 0 (never) or more, got {self.evict_after_days}")
        if self.table and (self.admit_after or self.evict_after_days):
            raise UserError(f"{where}: admit_after and evict_after_days belong to '{self.table}', which owns the table")
        if self.max_length and self.kind == "one_hot":
            raise UserError(f"{where}: max_length is for lists; set kind: sequence or leave it out")

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
        group: name of the group inside which a pairwise or listwise loss compares rows. Default: the schema's first.
        negative_keep_rate: share q of the rows with label 0 that the log still has (binary only); 1: all. The model
            learns the logit of the whole log: ``logit on the rows that were kept + log q``.
    """

    name: str
    type: Literal["binary", "regression"] = "binary"
    column: str = ""
    transform: Transform = "none"
    scale: float = 1.0
    mask: str = ""
    weight: float = 1.0
    at_least: float | None = None
    group: str = ""
    negative_keep_rate: float = 1.0

    def __post_init__(self) -> None:
        where = f"task '{self.name}'"
        object.__setattr__(self, "column", self.column or self.name)
        one_of(self.type, TASK_TYPES, f"{where}: type")
        one_of(self.transform, TRANSFORMS, f"{where}: transform")
        if self.type == "binary" and (self.transform != "none" or self.scale != 1.0):
            raise UserError(f"{where}: transform and scale are for regression; use at_least on a binary task")
        if self.type == "regression" and self.at_least is not None:
            raise UserError(f"{where}: at_least is for binary tasks")
        _check_scale(self.scale, where)
        if not 0 < self.weight < LARGEST:
            raise UserError(f"{where}: weight must be above 0, got {self.weight}; leave the task out instead")
        if self.at_least is not None:
            _check_finite(self.at_least, f"{where}: at_least")
        if not 0 < self.negative_keep_rate <= 1:
            raise UserError(
                f"{where}: negative_keep_rate is the share of the negatives that were kept, above 0 and at most 1, got "
                f"{self.negative_keep_rate}"
            )
        if self.type == "regression" and self.negative_keep_rate != 1:
            raise UserError(f"{where}: negative_keep_rate is for binary tasks; give rows a weight instead")


@dataclass(frozen=True, kw_only=True)
class GroupColumn:
    """A key that rows share, such as the user or the session, by which metrics and losses group them.

    Attributes:
        name: the group's name, part of the names of metrics (``gauc.user``).
        column: the Parquet column, of integers, booleans or strings. Default: the name. It may be a feature too.
    """

    name: str
    column: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "column", self.column or self.name)


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
        if not isinstance(key, str) or key not in fields:
            raise UserError(f"{where}: unknown key {str(key)!r}; {suggest(str(key), fields)}")
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
        hint = "; put it in quotes" if annotation == "str" and value is not None else ""
        hint = "; write it without quotes, and 1e-3 as 1.0e-3" if _is_float_text(value, annotation) else hint
        raise UserError(f"{where} must be {annotation}, got {value!r}{hint}")
    if isinstance(value, str) and not value.isprintable():
        raise UserError(f"{where} must be one line of printable characters, got {value!r}")
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where} must fit 64 bits, got a number of {len(f'{abs(value):x}')} hexadecimal digits")
    return float(value) if annotation.startswith("float") and value is not None else value


def _is_float_text(value: Any, annotation: str) -> bool:
    if not (annotation.startswith("float") and isinstance(value, str)):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _checked_vocabulary(given: Any, where: str) -> tuple[str | int, ...]:
    """A vocabulary as a tuple.

    Raises:
        UserError: it is no list, or a word is not a string or an integer, occurs twice or is of another type than the
            others.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        raise UserError(f"{where}: vocabulary must be a list, such as [de, fr], got {given!r}")
    words = tuple(given)
    for word in words:
        if isinstance(word, bool):
            raise UserError(
                f"{where}: vocabulary: {word!r} is a boolean, as YAML reads no, NO, on and yes; put it in quotes"
            )
        if not isinstance(word, str | int):
            raise UserError(f"{where}: vocabulary: {word!r} is neither a string nor an integer; put it in quotes")
        if isinstance(word, int) and not -(2**63) <= word < 2**63:
            raise UserError(f"{where}: vocabulary: an integer does not fit 64 bits; use strings")
    if len({type(word) for word in words}) > 1:
        raise UserError(f"{where}: vocabulary holds strings and integers; put all of them in quotes, or none")
    if len(set(words)) < len(words):
        twice = next(word for i, word in enumerate(words) if word in words[:i])
        raise UserError(f"{where}: vocabulary holds {twice!r} twice; each word has one row")
    return words


def _check_scale(scale: float, where: str) -> None:
    if not 1 / LARGEST < abs(scale) < LARGEST:
        raise UserError(f"{where}: scale must be a number other than 0, got {scale}")


def _check_finite(value: float, where: str) -> None:
    if not abs(value) < LARGEST:
        raise UserError(f"{where} must be a number that fits float32, got {value}")


def to_plain(entry: Any) -> dict[str, Any]:
    """A dataclass as a mapping, without default values and without a column that has its feature's name."""
    plain = {}
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if value != field.default and not (field.name == "column" and value == entry.name):
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain
