"""Rows that cannot be used: the description of a fault, and the policies raise, drop and quarantine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs

from ranker.atomic import replacing
from ranker.data.batch import Batch, Ragged
from ranker.data.filesystem import QUARANTINE_DIR, Root, one_line
from ranker.errors import UserError

POLICIES = ("raise", "drop", "quarantine")  # values of on_bad_rows


@dataclass(frozen=True, kw_only=True)
class Place:
    """Origin of rows: a Parquet file and one of its row groups."""

    file: str
    row_group: int

    def error(self, column: str, problem: str) -> UserError:
        """An error line with file, column and row group."""
        return UserError(f"{self.file}, column '{column}', row group {self.row_group}: {problem}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Fault:
    """One kind of fault in one column of a row group.

    Attributes:
        column: the Parquet column.
        reason: what is wrong with the rows. It follows a count in messages: "ids below 0".
        cure: what the user can do.
        rows: int64, positions within the row group.
        unseen_id: the rows have an id out of range, which could also be read as unknown.
    """

    column: str
    reason: str
    cure: str
    rows: npt.NDArray[np.int64]
    unseen_id: bool = False


def raise_first(
    faults: Sequence[Fault], place: Place, *, otherwise: str = "set on_bad_rows to drop or quarantine"
) -> None:
    """Raises an error for the first fault, if there is one.

    Args:
        faults: the faults of a row group.
        place: origin of the rows.
        otherwise: what else the user can do, besides the cure of the fault.

    Raises:
        UserError: there is a fault. The line names file, column, row group, the first row, and what to do.
    """
    for fault in faults:
        problem = f"{fault.reason} in {len(fault.rows)} rows, first in row {fault.rows[0]}"
        raise place.error(fault.column, f"{problem}; {fault.cure}, or {otherwise}")


def bad_rows(faults: Sequence[Fault]) -> npt.NDArray[np.int64]:
    """Positions of the rows with at least one fault, each once, in order, int64."""
    if not faults:
        return np.zeros(0, dtype=np.int64)
    return np.unique(np.concatenate([fault.rows for fault in faults]))


def drop_rows(batch: Batch, rows: npt.NDArray[np.int64]) -> Batch:
    """Removes rows from training without moving any other row.

    A dropped row keeps its position, time and row id. No task counts it and its features read as null, so it adds
    nothing to any loss, gradient or metric. Positions stay the same, and with them batches and resumption.
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


def write_quarantine(root: Root, place: Place, table: pa.Table, faults: Sequence[Fault]) -> None:
    """Writes the bad rows of a row group as they were read, with the columns file, row_group, row and reason.

    There is one file per row group, always with the same name. Reading a row group again, or on several ranks, writes
    the same file again.

    Args:
        root: the log's folder. The file is written to ``quarantine`` below it.
        place: origin of the rows.
        table: the row group.
        faults: its faults.

    Raises:
        UserError: the folder cannot be written.
    """
    rows = bad_rows(faults)
    reasons: dict[int, list[str]] = {int(row): [] for row in rows}
    for fault in faults:
        for row in fault.rows.tolist():
            reasons[row].append(f"{fault.column}: {fault.reason}")
    bad = table.take(pa.array(rows))
    extra = {
        "file": pa.array([place.file] * len(rows)),
        "row_group": pa.array([place.row_group] * len(rows)),
        "row": pa.array(rows),
        "reason": pa.array(["; ".join(reasons[int(row)]) for row in rows]),
    }
    for name, values in extra.items():
        bad = bad.append_column(name, values)
    folder = root.join(QUARANTINE_DIR)
    name = place.file.replace("/", "%2F").removesuffix(".parquet")  # one folder, so that it can be read as a table
    path = f"{folder}/{name}.row_group={place.row_group:05d}.parquet"
    try:
        if isinstance(root.filesystem, fs.LocalFileSystem):
            with replacing(Path(path)) as draft:
                pq.write_table(bad, draft)
        else:  # an object store shows a file only when it is complete
            root.filesystem.create_dir(folder, recursive=True)
            pq.write_table(bad, path, filesystem=root.filesystem)
    except OSError as error:
        raise UserError(f"cannot write bad rows to {path} ({one_line(error)}); set on_bad_rows=drop") from error
