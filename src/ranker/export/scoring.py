"""Scores a Parquet file with an exported program, in pieces, with memory use independent of the file size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.atomic import replacing
from ranker.data.arrow_types import plain, plain_schema
from ranker.data.batch import Batch
from ranker.data.checks import check_feature_columns, check_id_types
from ranker.data.decode import decode
from ranker.data.filesystem import one_line
from ranker.data.loader import in_order
from ranker.data.row_faults import Fault, Place, bad_rows, raise_first
from ranker.data.schema import Schema
from ranker.errors import UserError, one_of
from ranker.export.bundle import unseen
from ranker.export.program_runtime import Engine

ROW_GROUP = 131_072  # rows per row group of the output, a few MB
ROW = "row"  # name of the row id column if the file has none
ON_BAD_ROWS = ("raise", "null")
UNSEEN_IDS = ("raise", "unknown")
_OTHERWISE = "give such rows no score with --on-bad-rows null"
_AHEAD = 2  # pieces decoded ahead
_BUFFER = 1 << 18  # bytes per column


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of the file.

    Attributes:
        batch: their features and row ids.
        bad: positions of rows that cannot be scored.
        kept: the columns that the output repeats.
    """

    batch: Batch
    bad: np.ndarray
    kept: pa.Table


class ParquetRows:
    """The rows of a Parquet file in pieces, decoded in the same way as training data.

    Labels, masks and times may be missing. The columns of the features are required.

    Args:
        path: the file.
        schema: of the export.
        piece_rows: rows per piece.
        on_bad_rows: ``raise`` stops at the first row that cannot be used; ``null`` gives such rows a null score.
        unseen_ids: ``raise`` treats an id out of range as such a row; ``unknown`` reads it as unknown, row 0 of its
            table.
        id_types: by column, the type of the ids that the model was trained on. Empty if it is not known.
        keep: columns of the file that the output repeats, in this order.

    Raises:
        UserError: the file is not a Parquet file, or a column is missing or has the wrong type, or a column to keep
            has the name of another one of the output.
    """

    def __init__(
        self,
        path: Path,
        schema: Schema,
        *,
        piece_rows: int,
        on_bad_rows: str = "raise",
        unseen_ids: str = "raise",
        id_types: Mapping[str, str] | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        one_of(on_bad_rows, ON_BAD_ROWS, "--on-bad-rows")
        one_of(unseen_ids, UNSEEN_IDS, "--unseen-ids")
        if piece_rows < 1:
            raise UserError(f"--batch-rows must be 1 or more, got {piece_rows}")
        if not path.is_file():
            raise UserError(f"no file {path}")
        self._path, self._schema = path, schema
        self._piece_rows = min(piece_rows, 2**31)  # Arrow takes no larger number than fits a long
        self._on_bad_rows, self._unseen_ids = on_bad_rows, unseen_ids
        try:
            stored = pq.read_schema(path)
            columns = plain_schema(stored)
            check_feature_columns(columns, schema=schema, file=str(path))
            check_id_types(columns, id_types or {}, schema=schema, file=str(path))
            self._names = schema.feature_columns()
            has_id = schema.row_id in columns.names
            self.id_name = schema.row_id if has_id else ROW
            while self.id_name in schema.task_names:  # the output has one column per task, with its name
                self.id_name += "_id"
            if has_id and schema.row_id not in self._names:
                self._names.append(schema.row_id)
            self.kept = self._kept(stored, keep)
            read = [*self._names, *(name for name in keep if name not in self._names)]
            if has_id and not pa.types.is_integer(columns.field(schema.row_id).type):
                raise UserError(f"{path}: row id '{schema.row_id}' is {columns.field(schema.row_id).type}, no integer")
            leaves = pq.read_metadata(path).schema
            texts = [leaves.column(i) for i in range(len(leaves))]
            strings = [leaf.path for leaf in texts if leaf.logical_type.type == "STRING" and leaf.path in read]
            # Without these options Arrow reads a whole row group, or whole columns of it, into memory.
            self._file = pq.ParquetFile(
                path, read_dictionary=strings, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True
            )
        except pa.ArrowException as error:
            raise UserError(f"{path} is no Parquet file, or a broken one ({one_line(error)})") from error
        self._read = read
        self.num_rows: int = self._file.metadata.num_rows

    def __iter__(self) -> Iterator[Piece]:
        """All rows in order. The next pieces are decoded while one is scored."""
        tables = self._tables()
        fetch: Callable[[], Piece | None] = lambda: next(tables, None)  # noqa: E731
        found = in_order(itertools.repeat(fetch), workers=1, depth=_AHEAD)
        try:
            for piece in found:
                if piece is None:
                    return
                yield piece
        finally:
            found.close()

    def _kept(self, stored: pa.Schema, keep: Sequence[str]) -> pa.Schema:
        for name in keep:
            one_of(name, stored.names, f"{self._path}: --keep")
            if name == self.id_name or name in self._schema.task_names:
                raise UserError(f"--keep {name}: the output has a column of this name already; leave it out")
        if len(set(keep)) < len(keep):
            raise UserError(f"--keep names a column twice: {', '.join(keep)}")
        return pa.schema([stored.field(name) for name in keep])

    def _tables(self) -> Iterator[Piece]:
        first_row = 0
        for group in range(self._file.num_row_groups):
            place = Place(file=str(self._path), row_group=group)
            within = 0
            try:
                for records in self._file.iter_batches(
                    batch_size=self._piece_rows, row_groups=[group], columns=self._read, use_threads=False
                ):
                    stored = pa.Table.from_batches([records])
                    kept = stored.select(self.kept.names)
                    table = plain(stored.select(self._names), where=str(self._path))
                    yield self._piece(table, kept, first_row=first_row, within=within, place=place)
                    first_row += table.num_rows
                    within += table.num_rows
            except (pa.ArrowException, OSError) as error:
                raise place.error(self._names[0], f"{one_line(error)}; if it is broken, write it again") from error

    def _piece(self, table: pa.Table, kept: pa.Table, *, first_row: int, within: int, place: Place) -> Piece:
        batch, faults = decode(
            table,
            schema=self._schema,
            first_row=first_row,
            place=place,
            labelled=False,
            unseen_ids=self._unseen_ids == "unknown",
        )
        if faults and self._on_bad_rows == "raise":
            raise_first([_for_scoring(_moved(fault, within)) for fault in faults], place, otherwise=_OTHERWISE)
        return Piece(batch, bad_rows(faults), kept)


def score_file(
    rows: ParquetRows,
    engine: Engine,
    out: Path,
    *,
    tasks: Sequence[str],
    advance: Callable[[int], None] = unseen,
) -> int:
    """Scores rows and writes a Parquet file, atomically.

    Args:
        rows: the rows to score.
        engine: the exported program.
        out: the file; an existing one is replaced. Columns: the row id (int64), the kept ones, and one float32 column
            per task.
        tasks: names of the tasks, in the order of the program.
        advance: called with the number of rows of each piece.

    Returns:
        The number of rows without a score.

    Raises:
        UserError: a row cannot be used, or the output cannot be written.
    """
    columns = pa.schema([(rows.id_name, pa.int64()), *rows.kept, *((name, pa.float32()) for name in tasks)])
    missing = 0
    try:
        with replacing(out) as draft, pq.ParquetWriter(draft, columns) as writer:
            held: list[pa.Table] = []
            for piece in rows:
                held.append(_scored(piece, engine, columns))
                missing += len(piece.bad)
                if sum(table.num_rows for table in held) >= ROW_GROUP:
                    writer.write_table(pa.concat_tables(held).combine_chunks())
                    held.clear()
                advance(len(piece.batch))
            if held:
                writer.write_table(pa.concat_tables(held).combine_chunks())
    except OSError as error:
        raise UserError(f"cannot write {out}: {one_line(error)}") from error
    return missing


def _scored(piece: Piece, engine: Engine, columns: pa.Schema) -> pa.Table:
    scores_BT = engine(piece.batch).scores_BT.numpy()
    unknown = np.zeros(len(piece.batch), dtype=np.bool_)
    unknown[piece.bad] = True
    values = [pa.array(scores_BT[:, t], mask=unknown) for t in range(scores_BT.shape[1])]
    return pa.Table.from_arrays([pa.array(piece.batch.row_B.numpy()), *piece.kept.columns, *values], schema=columns)


def _moved(fault: Fault, rows: int) -> Fault:
    return replace(fault, rows=fault.rows + rows)


def _for_scoring(fault: Fault) -> Fault:
    """The fault with a cure that is in reach of someone who scores: the schema cannot change any more."""
    if fault.unseen_id:
        return replace(fault, cure="read such ids as unknown with --unseen-ids unknown")
    return replace(fault, cure="correct the file")
