"""Rows that cannot be trained on: what is wrong with them, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from ranker.data.batch import Batch, Ragged
from ranker.errors import UserError, suggest

OnBadRows = Literal["raise", "drop", "quarantine"]
ON_BAD_ROWS: tuple[OnBadRows, ...] = ("raise", "drop", "quarantine")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where rows come from: a Parquet file and one of its row groups."""

    file: str
    row_group: int

    def error(self, column: str, problem: str) -> UserError:
        """One line with file, column and row group."""
        return UserError(f"{self.file}, column '{column}', row group {self.row_group}: {problem}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Fault:
    """One kind of trouble in one column of a row group.

    Attributes:
        column: the Parquet column.
        reason: what is wrong with the rows, to be read after a count: "ids below 0".
        cure: what the user can do.
        rows: int64, positions within the row group.
    """

    column: str
    reason: str
    cure: str
    rows: npt.NDArray[np.int64]


def check_policy(on_bad_rows: str) -> OnBadRows:
    """Returns a known policy.

    Raises:
        UserError: it is not one of raise, drop, quarantine.
    """
    for known in ON_BAD_ROWS:
        if on_bad_rows == known:
            return known
    raise UserError(f"on_bad_rows '{on_bad_rows}' is unknown; {suggest(str(on_bad_rows), ON_BAD_ROWS)}")


def raise_first(faults: Sequence[Fault], place: Place) -> None:
    """Refuses the row group.

    Raises:
        UserError: there is a fault; the line names file, column, row group, the first row, and what to do.
    """
    for fault in faults:
        problem = f"{fault.reason} in {len(fault.rows)} rows, first in row {fault.rows[0]}"
        raise place.error(fault.column, f"{problem}; {fault.cure}, or set on_bad_rows to drop or quarantine")


def bad_rows(faults: Sequence[Fault]) -> npt.NDArray[np.int64]:
    """Positions of the rows with at least one fault, each once, in order."""
    if not faults:
        return np.zeros(0, dtype=np.int64)
    return np.unique(np.concatenate([fault.rows for fault in faults]))


def silence(batch: Batch, rows: npt.NDArray[np.int64]) -> Batch:
    """Takes rows out of training without moving any other row.

    A row taken out keeps its place, time and row id, but no task counts it and its features read as null: it adds
    nothing to any loss, gradient or metric. Positions, and with them batches and resumption, stay as they were.
    """
    index = torch.from_numpy(rows)
    ragged = {}
    for name, lists in batch.ragged.items():
        lengths = torch.diff(lists.offsets)
        kept = torch.ones(len(lengths), dtype=torch.bool).index_fill_(0, index, False)
        values = lists.values[torch.repeat_interleave(kept, lengths)]
        offsets = torch.zeros_like(lists.offsets)
        torch.cumsum(lengths * kept, 0, out=offsets[1:])
        ragged[name] = Ragged(values, offsets)
    return replace(
        batch,
        dense_BF=batch.dense_BF.index_fill(0, index, 0.0),
        onehot_BC=batch.onehot_BC.index_fill(0, index, 0),
        ragged=ragged,
        labels_BT=batch.labels_BT.index_fill(0, index, 0.0),
        mask_BT=batch.mask_BT.index_fill(0, index, False),
    )
