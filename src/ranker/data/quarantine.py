"""Bad rows put aside: written beside the data with the reason, for a person to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ranker.data.filesystem import Root, one_line
from ranker.data.row_faults import Fault, Place, bad_rows
from ranker.errors import UserError

QUARANTINE_DIR = "quarantine"


def write_quarantine(root: Root, place: Place, table: pa.Table, faults: Sequence[Fault]) -> None:
    """Writes the bad rows of a row group, as they were read, with the columns file, row_group, row and reason.

    There is one file a row group, always the same, so reading a row group again, or on several ranks, adds nothing.

    Args:
        root: the log's directory; the file goes into ``quarantine`` below it.
        place: where the rows are from.
        table: the row group.
        faults: what is wrong with it.

    Raises:
        UserError: the directory cannot be written to.
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
    path = f"{folder}/{place.file.removesuffix('.parquet')}.row_group={place.row_group:05d}.parquet"
    draft = f"{path}.{os.getpid()}.tmp"
    try:
        root.filesystem.create_dir(folder, recursive=True)
        if isinstance(root.filesystem, fs.LocalFileSystem):
            pq.write_table(bad, draft, filesystem=root.filesystem)
            os.replace(draft, path)
        else:  # an object store shows a file when it is whole
            pq.write_table(bad, path, filesystem=root.filesystem)
    except OSError as error:
        raise UserError(f"cannot write bad rows to {path} ({one_line(error)}); set on_bad_rows=drop") from error
