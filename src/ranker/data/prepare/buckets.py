"""Rows cut by time into buckets that fit memory: the step that makes sorting a log of any size possible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.times import DAY_MS, Ints

SLOT_MS = 60_000  # exact duplicates have the same time, so any cut by time keeps them together
BUCKET_ROWS = 262_144
DEALT_ROWS = 262_144  # rows distributed at a time
OPEN_FILES = 128  # buckets written at a time: far below the files that a process may open

# ``step(words, total=None)``: a context manager around one step of a progress bar. It yields a function to call with
# the number of rows done since the last call.
Step = Callable[..., AbstractContextManager[Callable[[int], None]]]


def count_slots(times_ms: Ints, counts: Counter[int]) -> None:
    """Adds the number of rows of each slot of SLOT_MS, counted from 1970-01-01."""
    slots, rows = np.unique(times_ms // SLOT_MS, return_counts=True)
    counts.update(dict(zip(slots.tolist(), rows.tolist(), strict=True)))


def bucket_starts(counts: Mapping[int, int], *, rows: int | None = None, within_days: bool = False) -> list[int]:
    """First slots of buckets of at most BUCKET_ROWS rows each, unless a single slot has more.

    Args:
        counts: number of rows of each slot, in ascending order of the slots.
        rows: rows of a bucket. None: BUCKET_ROWS.
        within_days: no bucket has rows of two UTC days.
    """
    starts: list[int] = []
    held, most, per_day = 0, BUCKET_ROWS if rows is None else rows, DAY_MS // SLOT_MS
    for slot, here in counts.items():
        new_day = within_days and bool(starts) and slot // per_day != starts[-1] // per_day
        if not starts or new_day or held + here > most:
            starts.append(slot)
            held = 0
        held += here
    return starts


def deal(
    raw: Sequence[Path], starts: Sequence[int], staging: Path, *, time: str, total: int, step: Step
) -> Iterator[list[Path]]:
    """The files of each bucket, in ascending time. Rows of a bucket keep the order of the sources.

    Many buckets are dealt in two rounds or more, so that no more than OPEN_FILES files are open at once.

    Args:
        raw: Parquet files with the same columns. They are removed once their rows are dealt out.
        starts: first slot of each bucket.
        staging: folder for the buckets.
        time: name of their column of int64 Unix milliseconds.
        total: rows of the sources, for the progress bar.
        step: progress bar.
    """
    if len(starts) == 1:
        yield list(raw)
        return
    width = 1
    while -(-len(starts) // width) > OPEN_FILES:
        width *= OPEN_FILES
    with step("dealing out by time", total) as advance:
        paths = _deal_once(raw, starts[::width], staging, time=time, advance=advance)
    for number, path in enumerate(paths):
        inside = staging / path.stem
        if width > 1:
            inside.mkdir()
        rows = pq.read_metadata(path).num_rows
        yield from deal([path], starts[number * width :][:width], inside, time=time, total=rows, step=step)


def bucket_numbers(times_ms: Ints, starts: Sequence[int]) -> Ints:
    """The bucket of each row."""
    cuts = np.asarray(starts, dtype=np.int64) * SLOT_MS
    return np.searchsorted(cuts, times_ms, side="right") - 1


def by_bucket(table: pa.Table, numbers: Ints) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each bucket that has some, in their order."""
    order = np.argsort(numbers, kind="stable")
    sorted_rows, found = table.take(pa.array(order)), numbers[order]
    firsts = np.flatnonzero(np.diff(found, prepend=-1))
    for first, stop in zip(firsts, [*firsts[1:], len(found)], strict=True):
        yield int(found[first]), sorted_rows.slice(first, stop - first)


def _deal_once(
    raw: Sequence[Path], starts: Sequence[int], staging: Path, *, time: str, advance: Callable[[int], object]
) -> list[Path]:
    """Writes each row into the file of its bucket, a piece of the sources at a time."""
    paths = [staging / f"bucket-{i}.parquet" for i in range(len(starts))]
    with ExitStack() as stack:
        writers: dict[int, pq.ParquetWriter] = {}
        for source in raw:
            with pq.ParquetFile(source) as stored:
                for piece in stored.iter_batches(batch_size=DEALT_ROWS):
                    table = pa.Table.from_batches([piece])
                    numbers = bucket_numbers(table[time].to_numpy(), starts)
                    for bucket, part in by_bucket(table, numbers):
                        if bucket not in writers:
                            writer = pq.ParquetWriter(paths[bucket], part.schema, compression="lz4")
                            writers[bucket] = stack.enter_context(writer)
                        writers[bucket].write_table(part)
                    advance(table.num_rows)
            source.unlink()
    return paths
