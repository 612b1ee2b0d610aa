"""The journal of changed rows: what going back to a snapshot needs of tables that are too large to copy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ranker.models.sharding import Shard


@dataclass
class _Kept:
    """Rows of one shard as they were at a mark, on the CPU."""

    rows: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)
    accumulator: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor, weight: Tensor, accumulator: Tensor) -> None:
        self.rows.append(rows)
        self.weight.append(weight)
        self.accumulator.append(accumulator)

    def extend(self, later: _Kept) -> None:
        """Takes in what a later mark kept: of a row that both have, the values here are the older ones and win."""
        if later.rows:
            known = torch.cat(self.rows) if self.rows else torch.empty(0, dtype=torch.int64)
            for rows, weight, accumulator in zip(later.rows, later.weight, later.accumulator, strict=True):
                new = ~torch.isin(rows, known)
                self.add(rows[new], weight[new], accumulator[new])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for part in (self.rows, self.weight, self.accumulator) for t in part)


@dataclass
class _Mark:
    step: int
    kept: list[_Kept]  # by shard


class RowJournal:
    """Keeps each row of this process's shards as it was at the last mark, before it is used for the first time since.

    A mark costs nothing. Going back to one puts back the rows that were used since, newest mark first. So a snapshot
    takes only rows that later steps touch:

        memory = sum over marks of (rows touched until the next mark) * (4 * width + 8 + accumulator) bytes,
                 and one byte a row of the shard; at most the shard itself per mark

    Rows are noted when they are looked up in training, which is before the backward pass moves them.

    Args:
        shards: the shards, whose tensors the kernels update.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._marks: list[_Mark] = []
        self._seen: list[Tensor] = []  # since the newest mark, by shard

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(kept.nbytes for mark in self._marks for kept in mark.kept) + sum(s.nbytes for s in self._seen)

    @property
    def steps(self) -> list[int]:
        """Steps that the tables can go back to, oldest first."""
        return [mark.step for mark in self._marks]

    def mark(self, step: int) -> None:
        """Makes the tables of now a place to go back to."""
        if not self._seen:
            self._seen = [torch.zeros(len(s.weight), dtype=torch.bool) for s in self._shards]
        self._forget_seen()
        self._marks.append(_Mark(step, [_Kept() for _ in self._shards]))

    def keep(self, steps: Collection[int]) -> None:
        """Drops the marks of other steps; what they kept goes to the mark before them."""
        left: list[_Mark] = []
        for mark in self._marks:
            if mark.step in steps:
                left.append(mark)
            elif left:
                for older, newer in zip(left[-1].kept, mark.kept, strict=True):
                    older.extend(newer)
        if self._marks and left[-1:] != self._marks[-1:]:
            self._see_again(left[-1] if left else None)
        self._marks = left

    def note(self, number: int, rows: Tensor) -> None:
        """Keeps the rows of a shard that a training step is about to use, if no step used them since the last mark."""
        if not self._marks or not torch.is_grad_enabled():  # a lookup without gradients moves nothing
            return
        used, seen, shard = rows.detach().to("cpu", torch.int64).unique(), self._seen[number], self._shards[number]
        new = used[~seen[used]]
        if len(new):
            seen[new] = True
            place = new.to(shard.weight.device)
            with torch.no_grad():
                self._marks[-1].kept[number].add(
                    new,
                    shard.weight.index_select(0, place).to("cpu"),
                    shard.accumulator.index_select(0, place).to("cpu"),
                )

    @torch.no_grad()
    def go_back(self, step: int) -> None:
        """Puts the tables back to where they were at a mark, and drops later marks.

        Raises:
            KeyError: there is no mark of this step.
        """
        if step not in self.steps:
            raise KeyError(step)
        while True:
            mark = self._marks[-1]
            for shard, kept in zip(self._shards, mark.kept, strict=True):
                for rows, weight, accumulator in zip(kept.rows, kept.weight, kept.accumulator, strict=True):
                    place = rows.to(shard.weight.device)
                    shard.weight.index_copy_(0, place, weight.to(shard.weight.device))
                    shard.accumulator.index_copy_(0, place, accumulator.to(shard.weight.device))
            if mark.step == step:
                break
            self._marks.pop()
        self._marks[-1] = _Mark(step, [_Kept() for _ in self._shards])
        for seen in self._seen:
            seen.zero_()

    def _forget_seen(self) -> None:
        """Marks all rows as unused; takes time for those that were used alone."""
        if self._marks:
            for seen, kept in zip(self._seen, self._marks[-1].kept, strict=True):
                for rows in kept.rows:
                    seen[rows] = False

    def _see_again(self, mark: _Mark | None) -> None:
        for number, seen in enumerate(self._seen):
            seen.zero_()
            for rows in mark.kept[number].rows if mark else ():
                seen[rows] = True
