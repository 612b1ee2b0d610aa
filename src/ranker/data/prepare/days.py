"""From raw logs to one sorted Parquet file a UTC day, in memory bounded by a day or a million rows.

Three steps, each streamed: the sources become Parquet as they are; their rows are dealt out to buckets of whole
days; each bucket is freed of duplicates, sorted, finished and written. Nothing is ever sorted as a whole.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.manifest import FileEntry, day_file, sha256_of
from ranker.data.prepare.recipe import TIME, Recipe
from ranker.data.prepare.show import Step
from ranker.data.schema import Schema, Task
from ranker.errors import UserError

DAY_MS = 86_400_000
BUCKET_ROWS = 1_000_000
DEALT_ROWS = 131_072  # rows dealt out at a time
ROW_GROUP = 65_536
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
    counts = _rows_by_day(raw)
    starts = _bucket_starts(counts)
    buckets = [raw] if len(starts) == 1 else _deal(raw, starts, staging, total=sum(counts.values()), step=step)
    entries: list[FileEntry] = []
    with step("sorting and writing", sum(counts.values())) as advance:
        for bucket in buckets:
            frame = pl.read_parquet(bucket)
            rows = len(frame)
            for path in bucket:
                path.unlink()
            # Sorting by every column makes the order of rows of the same time a property of the data.
            frame = frame.unique(maintain_order=False).sort([TIME, *sorted(c for c in frame.columns if c != TIME)])
            for _, day in frame.group_by(pl.col(TIME).floordiv(DAY_MS), maintain_order=True):
                entries.append(_write(recipe.finish(day), recipe.schema, root))
            advance(rows)
    return Written(entries=tuple(entries), rows_read=sum(counts.values()))


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


def _rows_by_day(raw: Sequence[Path]) -> dict[int, int]:
    """Rows of each UTC day, ascending; days are counted from 1970-01-01."""
    table = (
        pl.scan_parquet(list(raw))
        .group_by(pl.col(TIME).floordiv(DAY_MS).alias("day"))
        .agg(pl.len(), pl.col(TIME).min())
        .collect(engine="streaming")
        .sort("day", nulls_last=False)
    )
    if len(table) == 0:
        raise UserError("the log has no rows, so there is nothing to prepare; look at the source files")
    if table["day"][0] is None:
        raise UserError(f"{table['len'][0]} rows of the log have no time; drop them from the source files")
    if table[TIME][0] < FIRST_TIME_MS:
        raise UserError(f"a row's time is {table[TIME][0]} ms after 1970, too early to be real; is it in seconds?")
    return dict(zip(table["day"].to_list(), table["len"].to_list(), strict=True))


def _bucket_starts(counts: Mapping[int, int]) -> list[int]:
    """First days of buckets of whole days with at most BUCKET_ROWS rows each, where a single day is not more."""
    starts: list[int] = []
    held = 0
    for day, rows in counts.items():
        if not starts or held + rows > BUCKET_ROWS:
            starts.append(day)
            held = 0
        held += rows
    return starts


def _deal(raw: Sequence[Path], starts: Sequence[int], staging: Path, *, total: int, step: Step) -> list[list[Path]]:
    """Each row into the file of its bucket, a piece of the sources at a time."""
    paths = [staging / f"bucket-{i}.parquet" for i in range(len(starts))]
    with ExitStack() as stack, step("dealing out to days", total) as advance:
        writers: dict[int, pq.ParquetWriter] = {}
        for source in raw:
            for piece in pq.ParquetFile(source).iter_batches(batch_size=DEALT_ROWS):
                frame = pl.DataFrame(pl.from_arrow(piece))
                cuts = pl.Series([start * DAY_MS for start in starts])
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


def _write(frame: pl.DataFrame, schema: Schema, root: Path) -> FileEntry:
    """One day's file, with plain Arrow types so that any reader of Parquet knows them."""
    table = frame.select(schema.columns()).to_arrow()
    fields = [pa.field(f.name, _plain(f.type)) for f in table.schema]
    first, last = frame[TIME][0], frame[TIME][-1]
    path = root / day_file(datetime.fromtimestamp(first / 1000, tz=UTC).strftime("%Y-%m-%d"))
    pq.write_table(table.cast(pa.schema(fields)), path, compression="zstd", row_group_size=ROW_GROUP)
    return FileEntry(
        path=path.name,
        rows=len(frame),
        time_min_ms=first,
        time_max_ms=last,
        sha256=sha256_of(path),
        label_rates={task.name: frame.select(_label(task).mean()).item() for task in schema.tasks},
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    is_text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return pa.string() if is_text else kind


def _label(task: Task) -> pl.Expr:
    """The label as it is trained on: ``transform(scale * y)``, or y >= at_least."""
    y = pl.col(task.column)
    if task.mask:
        y = pl.when(pl.col(task.mask)).then(y)
    if task.type == "binary":
        return (y >= (1 if task.at_least is None else task.at_least)).cast(pl.Float64)
    y = y.cast(pl.Float64) * task.scale
    return y.sign() * y.abs().log1p() if task.transform == "log1p" else y
