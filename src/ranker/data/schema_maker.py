"""Tasks and features made of raw columns, one at a time, each with a remark on what it is based on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from ranker.data.column_profile import ColumnProfile
from ranker.data.column_roles import (
    FEW,
    HISTORY,
    LABELLED,
    is_binary,
    is_heavy,
    is_id,
    is_outcome,
    is_written_day,
    reads_as,
    time_format,
    words,
)
from ranker.data.columns import CategoricalFeature, DenseFeature, Task, Transform
from ranker.data.raw_log import RawProfile
from ranker.data.raw_values import as_number
from ranker.errors import UserError

MOST_TASKS = 8
UNIQUE = 0.95  # distinct values a row from which a column names the row
TEXT = 40  # characters of a text that is no name
ROOM = 1.5  # hash buckets per id seen
WIDE = 1000  # ids from which an embedding is wider
LISTED = 50  # ids that a sequence keeps
SHARED = 0.9  # of the ids of a list that are ids of a column: they share its table


class SchemaMaker:
    """Collects tasks and features column by column.

    Args:
        profile: what is in the columns.
        time_column: the column that orders the log.

    Attributes:
        tasks: the tasks so far.
        dense: the dense features so far.
        categorical: the categorical features so far.
        row_id: the column that names a row; empty without.
        remarks: by column, what its entry is based on.
        left_out: columns that are neither feature nor task, with the reason.
    """

    def __init__(self, profile: RawProfile, time_column: str) -> None:
        self._profile, self.time_column = profile, time_column
        self.tasks: list[Task] = []
        self.dense: list[DenseFeature] = []
        self.categorical: list[CategoricalFeature] = []
        self.row_id = ""
        self.remarks: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    def likely_tasks(self) -> list[str]:
        """Columns of outcomes that can be learned: enough labels of both kinds."""
        found: list[str] = []
        for name, column in self._profile.columns.items():
            kind = "" if name == self.time_column else is_outcome(name, column)
            if not kind:
                continue
            rare = _rarer(column)
            if kind == "binary" and rare < LABELLED:
                self.left_out[name] = f"an outcome, of which only {rare} rows differ from the others"
            elif len(found) < MOST_TASKS:
                found.append(name)
        return found

    def add_tasks(self, names: Sequence[str]) -> None:
        """Makes tasks of columns.

        Raises:
            UserError: a column that was asked for holds no numbers.
        """
        for name in names:
            column = self._profile.columns[name]
            if reads_as(column) not in ("integer", "float", "boolean"):
                raise UserError(f"column '{name}' cannot be a task: it holds {reads_as(column)} values, not numbers")
            if not is_binary(column) and column.low >= column.high:
                raise UserError(f"column '{name}' cannot be a task: it is the same in every row")
            self.left_out.pop(name, None)
            if is_binary(column):
                self.tasks.append(Task(name=_plain(name), column=name))
                share = self._numbers(name).mean()
                self.remarks[name] = f"about {share:.2%} positive" + _unlabelled(column)
                continue
            scale = 0.001 if words(name)[-1:] == ["ms"] else 1.0
            values = self._numbers(name) * scale
            heavy = is_heavy(values) and column.low >= 0
            transform: Transform = "log1p" if heavy else "none"
            self.tasks.append(Task(name=_plain(name), column=name, type="regression", scale=scale, transform=transform))
            unit = " seconds" if scale != 1.0 else ""
            self.remarks[name] = (
                f"median {np.median(values):.4g}{unit}" + (", heavy-tailed" if heavy else "") + _unlabelled(column)
            )
        for name, column in self._profile.columns.items():
            if name not in names and name != self.time_column and is_outcome(name, column):
                self.left_out.setdefault(name, "an outcome too: not known before the row is shown")

    def add_feature(self, column: ColumnProfile) -> None:
        """Makes a feature of a column, or says why not."""
        name, kind = column.name, reads_as(column)
        if name == self.time_column or name in self.left_out or any(task.column == name for task in self.tasks):
            return
        reason = self._useless(column, kind)
        if reason:
            if reason == "row id":
                self.row_id = name
            else:
                self.left_out[name] = reason
        elif kind == "list":
            self._add_list(column)
        elif kind in ("string", "boolean") or (kind == "integer" and (is_id(name, column) or _is_small(column))):
            self._add_ids(column, kind)
        else:
            self._add_number(column)

    def _useless(self, column: ColumnProfile, kind: str) -> str:
        rows, distinct = self._profile.rows, column.distinct.estimate
        if not column.known:
            return "null in every row"
        if kind == "other":
            return f"its type, {column.type}, holds neither numbers nor ids"
        if kind == "time" or (kind in ("string", "integer") and time_format(column, self._profile.sample[column.name])):
            return "a time; a difference to the time of the row may be a feature, such as an age"
        if kind == "list":
            inner = column.elements.kind if column.elements is not None else "null"
            return "" if inner in ("integer", "string") else f"a list of {inner} values, not of ids"
        if distinct < 2 and not column.null_share:
            return "the same in every row"
        unique = rows >= 1000 and distinct >= UNIQUE * column.known
        if kind == "integer" and unique and column.kind == "integer" and not column.nulls and not self.row_id:
            return "row id" if column.distinct.estimate >= 0.97 * rows and is_id(column.name, column) else ""
        if kind == "integer" and is_written_day(column):
            return "a day; the time of the row says it too"
        if kind == "integer" and unique and column.low >= 0 and column.high < 2 * rows:
            return "it counts the rows"
        if kind == "string" and column.characters > TEXT * column.known:
            return "free text"
        if unique and (kind == "string" or (kind == "integer" and is_id(column.name, column))):
            return "another value in nearly every row"
        return ""

    def _add_ids(self, column: ColumnProfile, kind: str) -> None:
        distinct = column.distinct.estimate
        name = _plain(column.name)
        nulls = f", {column.null_share:.2g} null" if column.null_share else ""
        if kind == "boolean":
            self.categorical.append(CategoricalFeature(name=name, column=column.name, vocabulary=(0, 1)))
        elif distinct <= FEW and column.distinct.exact:
            self.categorical.append(CategoricalFeature(name=name, column=column.name, vocabulary=_listed(column, kind)))
        else:
            width = 16 if distinct > WIDE else 8
            buckets = _round(ROOM * distinct)
            self.categorical.append(
                CategoricalFeature(name=name, column=column.name, hash_buckets=buckets, embedding_dim=width)
            )
        about = "" if column.distinct.exact else "about "
        self.remarks[column.name] = f"{about}{distinct:,} distinct {'texts' if kind == 'string' else 'values'}{nulls}"

    def _add_list(self, column: ColumnProfile) -> None:
        kind: Literal["multi_hot", "sequence"] = "sequence" if set(words(column.name)) & HISTORY else "multi_hot"
        name, inner = _plain(column.name), column.elements
        assert inner is not None
        length = LISTED if kind == "sequence" and column.longest > LISTED else 0
        owner = next((f for f in self.categorical if self._shares(column, f)), None)
        self.remarks[column.name] = (
            f"lists of up to {column.longest:,}, about {column.distinct.estimate:,} distinct ids"
        )
        if owner is not None:
            dim = owner.embedding_dim
            self.categorical.append(
                CategoricalFeature(
                    name=name, column=column.name, kind=kind, table=owner.name, embedding_dim=dim, max_length=length
                )
            )
            return
        buckets = _round(ROOM * max(1, column.distinct.estimate))
        width = 16 if buckets > WIDE else 8
        self.categorical.append(
            CategoricalFeature(
                name=name, column=column.name, kind=kind, hash_buckets=buckets, embedding_dim=width, max_length=length
            )
        )

    def _shares(self, column: ColumnProfile, owner: CategoricalFeature) -> bool:
        other = self._profile.columns[owner.column]
        inner = column.elements
        if owner.kind != "one_hot" or not owner.hash_buckets or inner is None or inner.kind != reads_as(other):
            return False
        return column.distinct.contained_in(other.distinct) >= SHARED

    def _add_number(self, column: ColumnProfile) -> None:
        values = self._numbers(column.name)
        heavy = is_heavy(values)
        read = column.numbers + column.grouped + column.booleans
        fill = float(f"{np.median(values):.4g}") if column.null_share or read < column.known else None
        self.dense.append(
            DenseFeature(
                name=_plain(column.name),
                column=column.name,
                transform="log1p" if heavy else "none",
                scale=0.001 if words(column.name)[-1:] == ["ms"] else 1.0,
                fill_null=fill,
            )
        )
        tail = ", heavy-tailed" if heavy else ""
        nulls = f", {column.null_share:.2g} null" if column.null_share else ""
        self.remarks[column.name] = (
            f"{column.low:.4g} to {column.high:.4g}, median {np.median(values):.4g}{tail}{nulls}"
        )

    def _numbers(self, name: str) -> npt.NDArray[np.float64]:
        values = pl.Series(name, pl.from_arrow(self._profile.sample[name]))
        numbers = pl.DataFrame({name: values}).select(as_number(name, values.dtype))[name].drop_nulls()
        return numbers.to_numpy() if len(numbers) else np.zeros(1)


def _rarer(column: ColumnProfile) -> int:
    """Rows with the rarer of two values."""
    counts = [count for _, count in column.frequent.head(3)]
    return min(counts) if len(counts) > 1 else 0


def _is_small(column: ColumnProfile) -> bool:
    return column.distinct.estimate <= 20 and column.low >= -1


def _unlabelled(column: ColumnProfile) -> str:
    return f", {column.null_share:.2%} of the rows have no label" if column.null_share else ""


def _plain(name: str) -> str:
    """A name for a feature or task, which must not hold ``.`` or ``/``."""
    return name.replace(".", "_").replace("/", "_").strip() or "column"


def _listed(column: ColumnProfile, kind: str) -> tuple[str | int, ...]:
    values = [value for value, _ in column.frequent.head(FEW)]
    if kind == "integer":
        numbers = {_integer(value) for value in values} - {None}
        return tuple(sorted(number for number in numbers if number is not None))
    return tuple(sorted({str(value).strip() for value in values} - {""}))


def _integer(value: object) -> int | None:
    try:
        number = float(str(value).replace(",", ""))
    except ValueError:
        return None
    return int(number) if math.isfinite(number) and number == int(number) else None


def _round(number: float) -> int:
    """The next of 10, 20, 50, 100, 200, ..."""
    unit = 10 ** math.floor(math.log10(max(number, 10)))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= number)
