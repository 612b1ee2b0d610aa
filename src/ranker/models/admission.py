"""Ids without end: a row of a table is used once it has been seen often enough, and starts anew when it was forgotten.

With ``admit_after: k`` in the schema a row of the table stands for its id from the k-th time on that the id occurs in
training. Before, the id uses row 0, which it shares with unknown ids, so row 0 learns what a rare id is like. With
``evict_after_days: d`` a row that training has not seen for d days of the log's time is reset when it occurs again:
weights, accumulators and count. A hash bucket that an old id has left is then as new for the next one. The rows of a
window come in any order, so the days are counted to the time at which the window of the batch begins, from the latest
time at which the row can have been seen. A row may stay for the length of a window more, and no row goes too early.

The loader knows nothing of this. What was seen is a buffer of the model, so it is part of checkpoints, snapshots and
exports, and goes back with a rollback. All ranks count the rows of all ranks and decide alike. The cost of a step
depends on the batch and not on the table, because a row is looked at only when it occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ranker.data.batch import Batch
from ranker.data.schema import CategoricalFeature, Schema

if TYPE_CHECKING:
    from ranker.models.embeddings import EmbeddingTables

INIT_RANGE = 0.05  # of the weights of a table
MINUTE_MS, DAY_MINUTES = 60_000, 1440
_LARGEST_COUNT = 2**30
_SEEN, _ADMITTED, _EVICTED = range(3)


@dataclass(frozen=True)
class _Table:
    """A table with a rule: its place within the weight of its width, and the rule."""

    name: str
    start: int
    rows: int
    admit_after: int
    evict_after: int  # minutes; 0 for never


class Admission(nn.Module):
    """What training has seen of the rows of each table that has ``admit_after`` or ``evict_after_days``.

    Args:
        schema: gives the tables and their rules.
        start: first row of each table within the weight of its width.

    Attributes:
        names: the tables with a rule.
        on_count: called with a weight, the rows that are about to be counted, and which of them start anew (bool), for
            whoever follows which rows change.
    """

    totals: Tensor
    clock: Tensor  # minutes; the latest time of a row that was seen
    window: Tensor  # number of the window of the last batch, in its run
    opened: Tensor  # minutes; the clock when that window began

    def __init__(self, schema: Schema, start: Mapping[str, int]) -> None:
        super().__init__()
        self._places_in_run: Mapping[int, Tensor] = {}
        self.on_count: list[Callable[[Tensor, Tensor, Tensor], None]] = []
        self._tables: dict[int, list[_Table]] = {}
        for feature in schema.categorical:
            if has_rule(feature):
                minutes = round(feature.evict_after_days * DAY_MINUTES)
                table = _Table(feature.name, start[feature.name], feature.rows, feature.admit_after, minutes)
                self._tables.setdefault(feature.embedding_dim, []).append(table)
        self.names = [table.name for tables in self._tables.values() for table in tables]
        self._places: dict[int, tuple[list[int], list[str]]] = {}  # columns of one-hot features, names of ragged ones
        sizes: dict[int, int] = {}
        for feature in schema.categorical:
            sizes[feature.embedding_dim] = sizes.get(feature.embedding_dim, 0) + feature.rows
        for dim, tables in self._tables.items():
            rules = {table.name: table for table in tables}
            one_hot = [f for f in schema.one_hot if f.embedding_dim == dim]
            columns = [c for c, f in enumerate(one_hot) if schema.table_of(f).name in rules]
            ragged = [f.name for f in schema.ragged if schema.table_of(f).name in rules and f.embedding_dim == dim]
            self._places[dim] = columns, ragged
            limits = [rules[t].admit_after if (t := schema.table_of(f).name) in rules else 0 for f in one_hot]
            self.register_buffer(f"limits_{dim}", torch.tensor(limits, dtype=torch.int32), persistent=False)
            self.register_buffer(f"seen_{dim}", torch.zeros(sizes[dim], dtype=torch.int32))
            if any(table.evict_after for table in tables):
                self.register_buffer(f"last_{dim}", torch.zeros(sizes[dim], dtype=torch.int32))
        self._limit = {f.name: schema.table_of(f).admit_after for f in schema.ragged}
        self.register_buffer("totals", torch.zeros(len(self.names), 3, dtype=torch.int64))
        for name, value in (("clock", 0), ("window", -1), ("opened", 0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int64))

    def one_hot(self, rows_BC: Tensor, starts_C: Tensor, dim: int) -> Tensor:
        """The rows that stand for some ids: their own where they are admitted, else the first row of the table."""
        if dim not in self._tables:
            return rows_BC
        admitted = self.get_buffer(f"seen_{dim}")[rows_BC] >= self.get_buffer(f"limits_{dim}")
        return torch.where(admitted, rows_BC, starts_C)

    def ragged(self, rows_N: Tensor, start: int, name: str, dim: int) -> Tensor:
        """The same for the lists of a feature, whose table begins at ``start``."""
        if not self._limit[name]:
            return rows_N
        admitted = self.get_buffer(f"seen_{dim}")[rows_N] >= self._limit[name]
        return torch.where(admitted, rows_N, start)

    def counts_in(self, names: Iterable[str]) -> bool:
        """Whether the state of a net, by its names, has counts."""
        return any(name.startswith("embeddings.admission.seen_") for name in names)

    def admit_all(self, names: Collection[str]) -> None:
        """Admits every row of some tables: for weights that were trained without counting."""
        for dim, tables in self._tables.items():
            for table in (table for table in tables if table.name in names):
                rows = self.get_buffer(f"seen_{dim}")[table.start : table.start + table.rows]
                rows.clamp_(min=table.admit_after)

    def stand_for(self, places: Mapping[int, Tensor]) -> None:
        """Says which rows of a larger weight those of this one are, by width: a reset gives the weights of those."""
        self._places_in_run = dict(places)

    def begin_run(self) -> None:
        """Forgets the window of the last batch: a run that continues another one numbers its windows anew."""
        self.window.fill_(-1)

    @torch.no_grad()
    def observe(self, tables: EmbeddingTables, optimizer: Optimizer, batches: Sequence[Batch]) -> None:
        """Counts the rows of a batch before it is trained on, and resets those that were forgotten.

        Args:
            tables: the tables.
            optimizer: its state of a row is reset with the row.
            batches: this rank's rows; a replay of several ranks gives all shares.
        """
        window = max(batch.window for batch in batches)
        if window != int(self.window):
            self.opened.copy_(self.clock)
            self.window.fill_(window)
        now = max((int(b.time_ms_B.max()) // MINUTE_MS for b in batches if len(b.time_ms_B)), default=0)
        for dim, kinds in self._tables.items():
            columns, lists = self._places[dim]
            found = [tables.rows_of(batch, dim, columns, lists) for batch in batches]
            rows, counts = torch.unique(torch.cat(found), return_counts=True)
            rows, counts, now = _over_ranks(rows, counts, now)
            self.clock.fill_(max(int(self.clock), now))  # the rows of a window come in any order
            self._count(dim, kinds, rows, counts, tables, optimizer)

    def _count(
        self,
        dim: int,
        kinds: Sequence[_Table],
        rows: Tensor,
        counts: Tensor,
        tables: EmbeddingTables,
        optimizer: Optimizer,
    ) -> None:
        seen = self.get_buffer(f"seen_{dim}")
        starts = torch.tensor([table.start for table in kinds], device=rows.device)
        kind = torch.bucketize(rows, starts, right=True) - 1
        known = rows > starts[kind]  # row 0 of a table is nobody's
        rows, counts, kind = rows[known], counts[known], kind[known]
        limit = torch.tensor([table.admit_after for table in kinds], device=rows.device)[kind].clamp(min=1)
        before = seen[rows].long()
        weight = tables.tables.get_parameter(f"dim_{dim}.weight")
        stale = torch.zeros_like(before, dtype=torch.bool)
        last = self.get_buffer(f"last_{dim}") if any(table.evict_after for table in kinds) else None
        if last is not None:
            patience = torch.tensor([table.evict_after for table in kinds], device=rows.device)[kind]
            there = last[rows]  # 0: nothing is known of the time
            stale = (patience > 0) & (there > 0) & (before > 0) & (there + patience < self.opened)
        for tell in self.on_count:
            tell(weight, rows, stale)
        if last is not None:
            _reset(weight, rows[stale], optimizer, self._places_in_run.get(dim))
            last[rows] = self.clock.int()
        start = before.masked_fill(stale, 0)
        after = (start + counts).clamp(max=_LARGEST_COUNT)
        seen[rows] = after.int()
        first = self.names.index(kinds[0].name)
        admitted = ((start < limit) & (after >= limit)).long() - (stale & (before >= limit)).long()
        change = torch.stack([(before == 0).long(), admitted, stale.long()], dim=1)
        self.totals.index_add_(0, kind + first, change)

    def values(self) -> dict[str, float]:
        """Numbers for the trackers, by table: rows that were seen, the share of them admitted, and rows evicted."""
        found: dict[str, float] = {}
        for name, counts in zip(self.names, self.totals.tolist(), strict=True):
            found[f"{name}/seen"] = float(counts[_SEEN])
            found[f"{name}/admitted"] = counts[_ADMITTED] / max(counts[_SEEN], 1)
            found[f"{name}/evicted"] = float(counts[_EVICTED])
        return found


def has_rule(feature: CategoricalFeature) -> bool:
    """Whether the rows of a feature's own table are counted."""
    return bool(feature.admit_after or feature.evict_after_days)


def admission_of(net: nn.Module) -> Admission | None:
    """What a net has seen of its rows; None where no table has a rule."""
    found = getattr(getattr(net, "embeddings", None), "admission", None)
    return found if isinstance(found, Admission) else None


def observe(net: nn.Module, optimizer: Optimizer, batches: Sequence[Batch]) -> None:
    """``Admission.observe`` of a net. Every rank must call it, once before it trains on a batch."""
    admission = admission_of(net)
    if admission is not None:
        admission.observe(cast("EmbeddingTables", net.embeddings), optimizer, batches)


def _over_ranks(rows: Tensor, counts: Tensor, now: int) -> tuple[Tensor, Tensor, int]:
    """Distinct rows with their counts, and the latest time, over all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, counts, now
    world = dist.get_world_size()
    sizes = [rows.new_zeros(2) for _ in range(world)]
    dist.all_gather(sizes, rows.new_tensor([len(rows), now]))
    lengths, times = torch.stack(sizes).T.tolist()
    padded = rows.new_zeros(2, max(lengths))
    padded[:, : len(rows)] = torch.stack([rows, counts])
    shares = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(shares, padded)
    every = torch.cat([share[:, :length] for share, length in zip(shares, lengths, strict=True)], dim=1)
    distinct, place = torch.unique(every[0], return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, place, every[1]), max(times)


def _reset(weight: Tensor, rows: Tensor, optimizer: Optimizer, places: Tensor | None) -> None:
    """Gives rows new weights and the optimizer's initial state.

    Args:
        weight: the rows of all tables of a width.
        rows: the rows to reset.
        optimizer: steps the weight.
        places: of each row of the weight in a larger one; None: the rows themselves.
    """
    if not len(rows):
        return
    drawn = fresh_rows(rows if places is None else places.to(rows.device)[rows], weight.shape[1])
    weight[rows] = drawn.to(weight.dtype)
    for group in optimizer.param_groups:
        if any(param is weight for param in group["params"]):
            for name, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, Tensor) and value.shape[:1] == weight.shape[:1] and value.ndim:
                    value[rows] = group.get("initial_accumulator_value", 0.0) if name == "sum" else 0.0


def fresh_rows(rows: Tensor, dim: int) -> Tensor:
    """Weights for rows that start anew, uniform in [-0.05, 0.05], float32 [N, dim].

    They depend on the row alone, so that all ranks, a resumed run and a replay get the same, and no random generator
    moves: splitmix64 of the place in the weight (Steele et al., OOPSLA 2014), of which 24 bits are used.
    """
    z = rows[:, None] * dim + torch.arange(dim, device=rows.device) + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    return (_shifted(z, 40).float() / 2**23 - 1.0) * INIT_RANGE


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right of 64-bit integers."""
    return (z >> by) & ((1 << (64 - by)) - 1)
