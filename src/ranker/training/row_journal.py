"""The journal of changed rows: what going back to a snapshot needs of tables that are too large to copy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RowTensors = Mapping[str, Tensor]
"""Tensors with one entry for each row of a table, such as its weights and its accumulators."""


class Mark:
    """A moment to which tables can go back, for as long as somebody holds this object.

    Attributes:
        undone: the tables went back to before it.
    """

    def __init__(self) -> None:
        self.undone = False


class _Kept(NamedTuple):
    """Rows of a table as they were before their first use after a mark, on the CPU."""

    rows: Tensor
    tensors: list[Tensor]
    values: list[Tensor]  # of each tensor

    def only(self, chosen: Tensor) -> _Kept:
        return _Kept(self.rows[chosen], self.tensors, [values[chosen] for values in self.values])


@dataclass
class _Moment:
    mark: weakref.ref[Mark]
    tensors: list[dict[str, Tensor]]  # by table
    kept: list[list[_Kept]]  # by table


class RowJournal:
    """Keeps each row of some tables as it was at the last mark, before it is used for the first time since.

    A mark costs nothing. Going back to one puts back the rows that were used since, newest mark first. So a snapshot
    takes only rows that later steps touch:

        memory = sum over marks of (rows touched until the next mark) * (8 + bytes of a row in all its tensors),
                 and one byte a row of the tables; at most the tables themselves per mark

    What a mark kept goes to the mark before it once nobody holds it any more. A tensor may be replaced by another
    object, as by another optimizer: going back then gives the one that there was at the mark.

    Args:
        tables: for each table, a function that gives its tensors.
        rows: for each table, the number of its rows.
    """

    def __init__(self, tables: Sequence[Callable[[], RowTensors]], rows: Sequence[int]) -> None:
        self._tables, self._rows = tables, rows
        self._moments: list[_Moment] = []
        self._seen: list[Tensor] = []  # rows that were used since the newest mark, by table

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        pieces = [piece for moment in self._moments for table in moment.kept for piece in table]
        held = [x for piece in pieces for x in (piece.rows, *piece.values)]
        return sum(x.nbytes for x in (*held, *self._seen))

    def mark(self) -> Mark:
        """Makes the tables of now a moment to go back to."""
        if not self._seen:
            self._seen = [torch.zeros(rows, dtype=torch.bool) for rows in self._rows]
        if self._moments:  # takes time for the rows that were used alone
            for seen, pieces in zip(self._seen, self._moments[-1].kept, strict=True):
                for piece in pieces:
                    seen[piece.rows] = False
        self._drop_forgotten()
        mark = Mark()
        self._moments.append(
            _Moment(weakref.ref(mark), [dict(table()) for table in self._tables], [[] for _ in self._tables])
        )
        return mark

    @torch.no_grad()
    def note(self, number: int, rows: Tensor) -> None:
        """Keeps the rows of a table that are about to change, if none of them did since the last mark."""
        if not self._moments:
            return
        used, seen = rows.detach().to("cpu", torch.int64), self._seen[number]
        new = used[~seen[used]].unique()
        if len(new):
            seen[new] = True
            tensors = list(self._tables[number]().values())
            values = [x.index_select(0, new.to(x.device)).to("cpu") for x in tensors]
            self._moments[-1].kept[number].append(_Kept(new, tensors, values))

    @torch.no_grad()
    def go_back(self, mark: Mark) -> list[dict[str, Tensor]]:
        """Puts the tables back to where they were at a mark, and drops later marks.

        Returns:
            The tensors that each table had there.

        Raises:
            KeyError: the tables went back to before this mark.
        """
        place = self._place(mark)
        self._undo(place)
        for moment in self._moments[place + 1 :]:
            if (later := moment.mark()) is not None:
                later.undone = True
        del self._moments[place + 1 :]
        self._moments[place].kept = [[] for _ in self._tables]
        for seen in self._seen:
            seen.zero_()
        return self._moments[place].tensors

    @torch.no_grad()
    def put_back(self, mark: Mark, *, without: Collection[str]) -> list[dict[str, Tensor]]:
        """Gives tensors the values that they had at a mark; some stay, and so does the way to each mark.

        Returns:
            The tensors that each table had there, but those that stay.
        """
        place = self._place(mark)
        chosen = [{k: x for k, x in table.items() if k not in without} for table in self._moments[place].tensors]
        self._undo(place, only={id(x) for table in chosen for x in table.values()})
        return chosen

    @torch.no_grad()
    def rows_at(self, mark: Mark, number: int, rows: Tensor) -> dict[str, Tensor]:
        """Rows of a table as they were at a mark, on the CPU.

        Args:
            mark: where.
            number: of the table.
            rows: different ones in ascending order, int64.

        Raises:
            KeyError: the tables went back to before this mark.
        """
        place = self._place(mark)
        tensors = self._moments[place].tensors[number]
        found = {name: x.detach().index_select(0, rows.to(x.device)).to("cpu") for name, x in tensors.items()}
        names = {id(x): name for name, x in tensors.items()}
        if not len(rows):
            return found
        for moment in reversed(self._moments[place:]):
            for piece in moment.kept[number]:
                where = torch.searchsorted(rows, piece.rows).clamp(max=len(rows) - 1)
                wanted = rows[where] == piece.rows
                for tensor, values in zip(piece.tensors, piece.values, strict=True):
                    if id(tensor) in names:
                        found[names[id(tensor)]][where[wanted]] = values[wanted]
        return found

    def _place(self, mark: Mark) -> int:
        for place, moment in enumerate(self._moments):
            if moment.mark() is mark:
                return place
        raise KeyError(mark)

    def _undo(self, place: int, *, only: Collection[int] | None = None) -> None:
        for moment in reversed(self._moments[place:]):
            for piece in (piece for table in moment.kept for piece in table):
                for tensor, values in zip(piece.tensors, piece.values, strict=True):
                    if only is None or id(tensor) in only:
                        tensor.index_copy_(0, piece.rows.to(tensor.device), values.to(tensor.device))

    def _drop_forgotten(self) -> None:
        """Joins the marks that nobody holds any more with those before them. No row may be seen."""
        left: list[_Moment] = []
        for moment in self._moments:
            if moment.mark() is not None:
                left.append(moment)
            elif left:
                for seen, older, newer in zip(self._seen, left[-1].kept, moment.kept, strict=True):
                    _take_in(older, newer, seen)
        self._moments = left


def _take_in(older: list[_Kept], newer: list[_Kept], seen: Tensor) -> None:
    """Adds what a later mark kept: of a row that both have, the older values are those of the older mark."""
    for piece in older:
        seen[piece.rows] = True
    added = [piece.only(~seen[piece.rows]) for piece in newer]
    for piece in older:
        seen[piece.rows] = False
    older += [piece for piece in added if len(piece.rows)]
