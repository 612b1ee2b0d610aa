"""Ids that share a hash bucket: how many there are in a log, and how many chance would give.

expected share of ids that share their bucket    1 - (1 - 1/n)^(m - 1)        m ids in n buckets
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ranker.data.arrow_types import is_list
from ranker.data.decode import hashes_of
from ranker.data.hashing import UInt64s
from ranker.data.parquet_log import ParquetLog

KEPT_IDS = 4_194_304  # distinct ids that are kept by their hashes, 8 bytes each
_MANY = 0.2  # share of ids that is worth a warning


@dataclass
class Collisions:
    """Distinct ids of a hashed table and the buckets they share, in bounded memory.

    Of a table with more than KEPT_IDS ids, only some buckets are looked at, every 2nd, 4th or 8th and so on, with all
    ids in them. So what is measured there is exact, and the number of ids is scaled up.

    Attributes:
        buckets: ``hash_buckets`` of the table.
        step: every how manieth bucket is looked at.
    """

    buckets: int
    step: int = 1
    _hashes: UInt64s = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    def add(self, hashes: UInt64s) -> None:
        """Adds 64-bit hashes of ids, which may repeat. Ids of one hash are one id."""
        self._hashes = np.unique(np.concatenate([self._hashes, self._looked_at(hashes)]))
        while len(self._hashes) > KEPT_IDS and self.step < self.buckets:
            self.step *= 2
            self._hashes = self._looked_at(self._hashes)

    @property
    def ids(self) -> int:
        """The number of distinct ids."""
        looked_at = -(-self.buckets // self.step)
        return round(len(self._hashes) * self.buckets / looked_at)

    @property
    def measured(self) -> float:
        """Share of the ids that share their bucket with another one. 0 without ids."""
        if not len(self._hashes):
            return 0.0
        _, ids = np.unique(self._hashes % np.uint64(self.buckets), return_counts=True)
        return float(ids[ids > 1].sum() / len(self._hashes))

    @property
    def expected(self) -> float:
        """The share that chance would give so many ids."""
        return expected_share(self.ids, self.buckets)

    def _looked_at(self, hashes: UInt64s) -> UInt64s:
        if self.step == 1:
            return hashes
        return hashes[hashes % np.uint64(self.buckets) % np.uint64(self.step) == 0]


def expected_share(ids: int, buckets: int) -> float:
    """Share of the ids that share their bucket with another one, if each falls into any bucket alike."""
    if ids < 2 or buckets < 2:
        return 0.0 if ids < 2 else 1.0
    return -math.expm1((ids - 1) * math.log1p(-1 / buckets))


def buckets_for(ids: int, share: float) -> int:
    """Buckets with which the expected share is at most so large, rounded up to two digits."""
    wanted = -(ids - 1) / math.log1p(-share)
    digit = 10 ** max(len(str(int(wanted))) - 2, 0)
    return -(-int(wanted + 1) // digit) * digit


def collisions_of(log: ParquetLog, *, advance: Callable[[int], object] = int) -> dict[str, Collisions]:
    """By feature that owns a hashed table, its collisions in all rows of a log. Reads the columns of ids alone.

    Args:
        log: the log.
        advance: called with the number of rows read since the last call.
    """
    owners = {f.column: log.schema.table_of(f) for f in log.schema.categorical}
    columns = {column: owner for column, owner in owners.items() if owner.hash_buckets}
    found = {owner.name: Collisions(owner.hash_buckets) for owner in columns.values()}
    for group in range(len(log.index.places) if columns else 0):
        table = log.index.read(group, list(columns))
        for column, owner in columns.items():
            for chunk in table[column].chunks:
                found[owner.name].add(_hashes(chunk))
        advance(table.num_rows)
    return found


def lines_of(found: dict[str, Collisions]) -> list[str]:
    """What to say of each table."""
    return [
        f"table '{name}': {c.ids:,} ids in {c.buckets:,} buckets; {c.measured:.2%} of the ids share theirs "
        f"({c.expected:.2%} by chance)"
        for name, c in found.items()
    ]


def warnings_of(found: dict[str, Collisions]) -> list[str]:
    """A line for each table in which many ids share a bucket."""
    return [
        f"{c.measured:.0%} of the ids of '{name}' share their bucket with another one; hash_buckets: "
        f"{buckets_for(c.ids, 0.05)} would bring that to 5 %"
        for name, c in found.items()
        if c.measured > _MANY
    ]


def _hashes(column: pa.Array) -> UInt64s:
    """Hashes of the ids of a column, or of its lists, each at least once."""
    if is_list(column.type):
        column = column.flatten()
    distinct = column.unique()
    if pa.types.is_dictionary(distinct.type):
        distinct = distinct.dictionary_decode().unique()
    return hashes_of(distinct.drop_null())
