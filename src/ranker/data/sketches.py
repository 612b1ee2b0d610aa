"""Summaries of columns that do not fit memory: distinct values, frequent values, a sample of rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ranker.data.hashing import UInt64s, splitmix64

KEPT_HASHES = 4096  # standard error of the number of distinct values: 1 / sqrt(k), 1.6 %
KEPT_VALUES = 1024  # frequent values; the count of one is too low by at most rows / KEPT_VALUES


class Distinct:
    """Number of distinct values, from the k smallest of their hashes.

        n = (k - 1) / h_k        h_k: k-th smallest hash as a share of 2^64; exact below k values

    Source: Bar-Yossef et al., "Counting distinct elements in a data stream", RANDOM 2002.
    """

    def __init__(self) -> None:
        self._smallest: UInt64s = np.empty(0, dtype=np.uint64)

    def add(self, hashes: UInt64s) -> None:
        """Adds the hashes of values, which may repeat."""
        if len(self._smallest) == KEPT_HASHES:
            hashes = hashes[hashes < self._smallest[-1]]
        if len(hashes):
            self._smallest = np.unique(np.concatenate([self._smallest, hashes]))[:KEPT_HASHES]

    def merge(self, other: Distinct) -> None:
        """Adds the values of another part."""
        self.add(other._smallest)

    @property
    def estimate(self) -> int:
        """The number of distinct values so far."""
        kept = self._smallest
        if len(kept) < KEPT_HASHES:
            return len(kept)
        return round((KEPT_HASHES - 1) / (float(kept[-1]) / 2.0**64))

    @property
    def exact(self) -> bool:
        """Whether the estimate is the number itself."""
        return len(self._smallest) < KEPT_HASHES

    def contained_in(self, other: Distinct) -> float:
        """Share of these values that the other column has too. 0 if there are none."""
        mine, others = self._smallest, other._smallest
        if len(others) == KEPT_HASHES:
            mine = mine[mine <= others[-1]]
        return float(np.isin(mine, others).mean()) if len(mine) else 0.0


class Frequent:
    """The most frequent values with their counts. A count is too low by at most ``rows / KEPT_VALUES``.

    Source: Misra and Gries, "Finding repeated elements", 1982, in the mergeable form of Agarwal et al., PODS 2012.
    """

    def __init__(self) -> None:
        self._counts: pl.DataFrame | None = None

    def add(self, counts: pl.DataFrame) -> None:
        """Adds distinct values (column ``value``) with their counts (column ``count``)."""
        if self._counts is not None:
            both = pl.concat([self._counts, counts], how="vertical_relaxed")
            counts = both.group_by("value").agg(pl.col("count").sum())
        if len(counts) > KEPT_VALUES:
            counts = counts.top_k(KEPT_VALUES + 1, by="count")
            least = counts["count"].min()
            counts = counts.with_columns(pl.col("count") - least).filter(pl.col("count") > 0)
        self._counts = counts

    def merge(self, other: Frequent) -> None:
        """Adds the values of another part."""
        if other._counts is not None:
            self.add(other._counts)

    def head(self, number: int) -> list[tuple[object, int]]:
        """The most frequent values, in descending order of their counts, then of the values."""
        if self._counts is None:
            return []
        kept = self._counts.top_k(number, by="count").sort("value").sort("count", descending=True, maintain_order=True)
        return [(value, int(count)) for value, count in kept.select("value", "count").iter_rows()]


@dataclass
class RowSample:
    """A uniform sample of rows: those whose hashed positions are the smallest. The same for every way of reading.

    Attributes:
        size: number of rows kept.
    """

    size: int
    _tables: list[pa.Table] = field(default_factory=list)
    _hashes: list[UInt64s] = field(default_factory=list)
    _held: int = 0
    _limit: np.uint64 = field(default_factory=lambda: np.uint64(2**64 - 1))

    def add(self, table: pa.Table, positions: npt.NDArray[np.int64]) -> None:
        """Offers rows with their positions in the log."""
        hashes = splitmix64(positions)
        kept = np.flatnonzero(hashes < self._limit)
        if not len(kept):
            return
        self._tables.append(table.take(pa.array(kept)))
        self._hashes.append(hashes[kept])
        self._held += len(kept)
        if self._held > 2 * self.size:
            self._shrink()

    def table(self) -> pa.Table | None:
        """The sample in the order of the log; None before any row was offered."""
        if not self._tables:
            return None
        self._shrink()
        return self._tables[0]

    def _shrink(self) -> None:
        hashes = np.concatenate(self._hashes)
        table = pa.concat_tables(self._tables, promote_options="permissive")
        if len(hashes) > self.size:
            self._limit = np.partition(hashes, self.size)[self.size]
            kept = np.flatnonzero(hashes < self._limit)
            table, hashes = table.take(pa.array(kept)), hashes[kept]
        self._tables, self._hashes, self._held = [table.combine_chunks()], [hashes], len(hashes)
