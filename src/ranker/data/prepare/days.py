"""From raw logs to one sorted Parquet file a UTC day, in memory bounded by BUCKET_ROWS (or a minute, if it has more).

Three steps, each streamed: the sources become Parquet as they are; their rows are dealt out to buckets of whole
minutes; each bucket is freed of duplicates, sorted, finished and written. Nothing is ever sorted as a whole.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.manifest import FileEntry
from ranker.data.prepare.day_files import DayFiles
from ranker.data.prepare.recipe import TIME, Recipe
from ranker.data.prepare.report import Step
from ranker.errors import UserError

SLOT_MS = 60_000  # exact duplicates have the same time, so any cut by time keeps them together
BUCKET_ROWS = 262_144
DEALT_ROWS = 262_144  # rows dealt out at a time
FIRST_TIME_MS = 100_000_000_000  # 1973; a log that starts earlier counts in seconds


@dataclass(frozen=True, kw_only=True)
class Written:
    """What :func:`write_days` did.

    Attributes:
        entries: the files, in the order of time.
        rows_read: rows of the sources.
    """

    entries: tuple[FileEntry, ...]
    rows_read: int


def write_days(recipe: Recipe, root: Path, *, staging: Path, step: Step) -> Written:
    """Writes a log's rows, without exact duplicates and in the order of time, into one file a UTC day.

    Args:
        recipe: where the rows are and what becomes of them.
        root: an empty directory for the day files.
        staging: an empty directory for what is needed on the way; the caller removes it.
        step: tells a person about progress.

    Raises:
        UserError: a source file cannot be parsed, there are no rows, or their times make no sense.
    """
    raw = _stage(recipe, staging, step)
    counts = _rows_by_slot(raw)
    starts, total = _bucket_starts(counts), sum(counts.values())
    buckets = [raw] if len(starts) == 1 else _deal(raw, starts, staging, total=total, step=step)
    with step("sorting and writing", total) as advance, DayFiles(root, recipe.schema) as files:
        for bucket in buckets:
            frame = pl.read_parquet(bucket)
            rows = len(frame)
            for path in bucket:
                path.unlink()
            # Sorting by every column makes the order of rows of the same time a property of the data.
            frame = frame.unique(maintain_order=False).sort([TIME, *sorted(c for c in frame.columns if c != TIME)])
            files.add(recipe.finish(frame))
            advance(rows)
    return Written(entries=tuple(files.entries), rows_read=total)


def _stage(recipe: Recipe, staging: Path, step: Step) -> list[Path]:
    """Each source file as Parquet, with its columns and rows as they are."""
    staged = []
    for i, (file, frame) in enumerate(recipe.logs.items()):
        path = staging / f"raw-{i}.parquet"
        with step(f"reading {file.name}"):
            try:
                frame.sink_parquet(path, compression="lz4")
            except pl.exceptions.PolarsError as error:
                if "os error 28" in str(error):
                    # Polars wraps the system's error in its own; the caller looks for the system's.
                    raise OSError(errno.ENOSPC, "no space left", str(staging)) from error
                raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}; fetch it again") from error
        staged.append(path)
    return staged


def _rows_by_slot(raw: Sequence[Path]) -> dict[int, int]:
    """Rows of each slot of SLOT_MS that has any, ascending; slots are counted from 1970-01-01."""
    table = (
        pl.scan_parquet(list(raw))
        .group_by(pl.col(TIME).floordiv(SLOT_MS).alias("slot"))
        .agg(pl.len(), pl.col(TIME).min())
        .collect(engine="streaming")
        .sort("slot", nulls_last=False)
    )
    if len(table) == 0:
        raise UserError("the log has no rows, so there is nothing to prepare; look at the source files")
    if table["slot"][0] is None:
        raise UserError(f"{table['len'][0]} rows of the log have no time; drop them from the source files")
    if table[TIME][0] < FIRST_TIME_MS:
        raise UserError(f"a row's time is {table[TIME][0]} ms after 1970, too early to be real; is it in seconds?")
    return dict(zip(table["slot"].to_list(), table["len"].to_list(), strict=True))


def _bucket_starts(counts: Mapping[int, int]) -> list[int]:
    """First slots of buckets with at most BUCKET_ROWS rows each, where a single slot is not more."""
    starts: list[int] = []
    held = 0
    for slot, rows in counts.items():
        if not starts or held + rows > BUCKET_ROWS:
            starts.append(slot)
            held = 0
        held += rows
    return starts


def _deal(raw: Sequence[Path], starts: Sequence[int], staging: Path, *, total: int, step: Step) -> list[list[Path]]:
    """Each row into the file of its bucket, a piece of the sources at a time."""
    paths = [staging / f"bucket-{i}.parquet" for i in range(len(starts))]
    with ExitStack() as stack, step("dealing out by time", total) as advance:
        writers: dict[int, pq.ParquetWriter] = {}
        for source in raw:
            for piece in pq.ParquetFile(source).iter_batches(batch_size=DEALT_ROWS):
                frame = pl.DataFrame(pl.from_arrow(piece))
                cuts = pl.Series([start * SLOT_MS for start in starts])
                number = cuts.search_sorted(frame[TIME], side="right") - 1
                for (bucket,), part in frame.group_by(number.alias("bucket")):
                    table = pa.table(part.to_arrow())
                    if bucket not in writers:
                        writer = pq.ParquetWriter(paths[bucket], table.schema, compression="lz4")
                        writers[bucket] = stack.enter_context(writer)
                    writers[bucket].write_table(table)
                advance(len(frame))
            source.unlink()
    return [[path] for path in paths]
