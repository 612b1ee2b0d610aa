"""What a column holds: nulls, distinct and frequent values, range, and what its texts could be read as."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa

from ranker.data.arrow_types import is_list, is_string, value_type
from ranker.data.hashing import UInt64s, hash_bytes, splitmix64
from ranker.data.sketches import Distinct, Frequent

TRUE, FALSE = ("true", "t", "yes", "y"), ("false", "f", "no", "n")
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
GROUPED = r"^[+-]?\d{1,3}(,\d{3})+(\.\d+)?$"  # 1,234.5


@dataclass
class ColumnProfile:
    """A running summary of one column, in bounded memory.

    Attributes:
        name: name of the column.
        kind: ``integer``, ``float``, ``boolean``, ``string``, ``time``, ``list`` or ``other``, by its Arrow type.
        type: Arrow's name of the type.
        rows: rows so far.
        nulls: of which are null.
        nans: of which are NaN or infinite (floats).
        low: smallest finite number (of a string column: of its numbers).
        high: largest.
        whole: whether all finite numbers are integers.
        numbers: values that are numbers, also those of a string column that can be read as one.
        booleans: texts such as ``true`` and ``no``.
        grouped: texts with separated thousands, such as ``1,234``.
        characters: characters of all texts.
        distinct: distinct values; of a list column: of its elements.
        frequent: frequent values, likewise.
        elements: profile of a list column's elements.
        longest: elements of the longest list.
    """

    name: str
    kind: str = "other"
    type: str = ""
    rows: int = 0
    nulls: int = 0
    nans: int = 0
    low: float = math.inf
    high: float = -math.inf
    whole: bool = True
    numbers: int = 0
    booleans: int = 0
    grouped: int = 0
    characters: int = 0
    distinct: Distinct = field(default_factory=Distinct)
    frequent: Frequent = field(default_factory=Frequent)
    elements: ColumnProfile | None = None
    longest: int = 0

    @property
    def known(self) -> int:
        """Values that are neither null nor NaN."""
        return self.rows - self.nulls - self.nans

    @property
    def null_share(self) -> float:
        """Share of nulls and NaN."""
        return 1.0 - self.known / self.rows if self.rows else 0.0

    def add(self, column: pa.Array | pa.ChunkedArray) -> None:
        """Adds the values of some rows."""
        kind = value_type(column.type)
        self.rows += len(column)
        self.nulls += column.null_count
        if pa.types.is_null(kind):
            return
        self.kind, self.type = kind_of(kind), str(kind)
        if self.kind == "other":
            return
        if self.kind == "list":
            self._add_lists(column)
            return
        values = pl.Series(self.name, pl.from_arrow(column)).drop_nulls()
        if values.dtype == pl.Categorical:
            values = values.cast(pl.String)
        if self.kind == "time":
            values = values.to_physical()
        if values.dtype.is_float():
            finite = values.filter(values.is_finite())
            self.nans += len(values) - len(finite)
            values = finite
        if not len(values):
            return
        counts = values.value_counts(name="count").rename({self.name: "value"})
        self.frequent.add(counts)
        self.distinct.add(_hashes(counts["value"]))
        if self.kind == "string":
            self._add_texts(counts)
        else:
            self._add_numbers(counts["value"].cast(pl.Float64), counts["count"])

    def merge(self, other: ColumnProfile) -> None:
        """Adds the summary of other rows of the same column."""
        if self.kind == "other":
            self.kind, self.type = other.kind, other.type
        for count in ("rows", "nulls", "nans", "numbers", "booleans", "grouped", "characters"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.whole, self.longest = self.whole and other.whole, max(self.longest, other.longest)
        if other.elements is None:
            self.distinct.merge(other.distinct)
            self.frequent.merge(other.frequent)
            return
        if self.elements is None:
            self.elements = ColumnProfile(self.name)
            self.distinct, self.frequent = self.elements.distinct, self.elements.frequent
        self.elements.merge(other.elements)

    def _add_numbers(self, values: pl.Series, counts: pl.Series) -> None:
        if not len(values):
            return
        self.numbers += int(counts.sum())
        low, high = values.min(), values.max()
        assert isinstance(low, float)
        assert isinstance(high, float)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.whole = self.whole and bool((values == values.floor()).all())

    def _add_texts(self, counts: pl.DataFrame) -> None:
        """Each distinct text is looked at once."""
        text = pl.col("value").str.strip_chars()
        seen = counts.select(
            "count",
            length=pl.col("value").str.len_chars(),
            boolean=text.str.to_lowercase().is_in([*TRUE, *FALSE]),
            grouped=text.str.contains(GROUPED),
            number=pl.when(text.str.contains(NUMBER)).then(text.cast(pl.Float64, strict=False)),
        )
        count = pl.col("count")
        totals = seen.select(
            (count * pl.col("length")).sum().alias("characters"),
            count.filter(pl.col("boolean")).sum().alias("booleans"),
            count.filter(pl.col("grouped")).sum().alias("grouped"),
        ).row(0)
        self.characters += int(totals[0])
        self.booleans += int(totals[1])
        self.grouped += int(totals[2])
        known = seen.filter(pl.col("number").is_not_null() & pl.col("number").is_finite())
        self._add_numbers(known["number"], known["count"])

    def _add_lists(self, column: pa.Array | pa.ChunkedArray) -> None:
        if self.elements is None:
            self.elements = ColumnProfile(self.name)
            self.distinct, self.frequent = self.elements.distinct, self.elements.frequent
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            lengths = pa.compute.list_value_length(chunk)
            self.longest = max(self.longest, pa.compute.max(lengths).as_py() or 0)
            self.elements.add(chunk.flatten())


def kind_of(kind: pa.DataType) -> str:
    """The kind of a column, by its Arrow type."""
    kind = value_type(kind)
    if is_list(kind):
        return "list"
    if is_string(kind):
        return "string"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "time"
    tests = {"boolean": pa.types.is_boolean, "integer": pa.types.is_integer, "float": pa.types.is_floating}
    return next((name for name, test in tests.items() if test(kind)), "other")


def _hashes(values: pl.Series) -> UInt64s:
    """64-bit hashes of distinct values. A number has one hash as an integer and as a float."""
    if values.dtype == pl.String:
        flat = pa.concat_arrays([pa.array(values.to_arrow(), pa.large_string())])
        _, offsets, data = flat.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64, count=len(flat) + 1)
        return hash_bytes(np.frombuffer(data or b"", dtype=np.uint8), bounds)
    if values.dtype.is_float():
        whole = values.cast(pl.Float64)
        if bool((whole == whole.floor()).all()) and abs(whole).max() < 2.0**53:  # type: ignore[operator]
            return splitmix64(whole.cast(pl.Int64).to_numpy())
        return splitmix64(whole.to_numpy().view(np.int64))
    return splitmix64(values.cast(pl.Int64, wrap_numerical=True).to_numpy())
