"""The evaluation loader: a stretch of the log in time order, or blocks spread evenly over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ranker.data.batch import Batch
from ranker.data.dense_statistics import NOTHING, DenseStatistics
from ranker.data.log import Log
from ranker.data.prefetch import in_order
from ranker.data.windows import share

_BATCHES_AHEAD = 3


class EvalLoader:
    """One rank's share of some rows, in time order. All ranks get the same number of batches.

    Global batches are blocks of ``batch_size`` consecutive rows; each rank takes a contiguous part of each.
    """

    def __init__(
        self,
        log: Log,
        *,
        start: int,
        stop: int,
        batch_size: int,
        max_rows: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
        keep: bool = False,
        pin_memory: bool = False,
        statistics: Callable[[], DenseStatistics] = lambda: NOTHING,
    ) -> None:
        """Reads nothing yet.

        Args:
            log: where the rows come from.
            start: first row.
            stop: the row after the last.
            batch_size: rows of a block, over all ranks.
            max_rows: read at most about so many rows: whole blocks, at least one, spread evenly; None reads all.
            rank: number of this process.
            world_size: number of processes.
            num_workers: 0 reads in line, otherwise one thread reads ahead.
            keep: hold on to the rows after the first pass, for rows that are read again and again.
            pin_memory: pin the batches' memory, for a GPU.
            statistics: asked at the start of each pass for what dense features are normalised with.
        """
        assert 0 <= start <= stop
        blocks = -(-(stop - start) // batch_size)
        chosen = blocks if max_rows is None else min(blocks, max(1, max_rows // batch_size))
        firsts = [start + (i * blocks // chosen) * batch_size for i in range(chosen)]
        self.blocks = [(first, min(first + batch_size, stop)) for first in firsts]
        self._log, self._rank, self._world_size = log, rank, world_size
        self._num_workers, self._keep, self._pin_memory = num_workers, keep, pin_memory
        self._statistics = statistics
        self._kept: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._statistics().normalise, self._as_read())

    def _as_read(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        tasks: Iterator[Callable[[], Batch]] = (partial(self._read, *block) for block in self.blocks)
        for batch in in_order(tasks, workers=min(self._num_workers, 1), depth=_BATCHES_AHEAD):
            if self._keep:
                kept.append(batch)
            yield batch
        if self._keep:
            self._kept = kept

    def _read(self, start: int, stop: int) -> Batch:
        low, high = share(stop - start, rank=self._rank, world_size=self._world_size)
        # An empty share still needs the columns, so a row is read and cut away.
        rows = self._log.read(start + low, start + max(high, low + 1)).slice(0, high - low)
        return rows.pin_memory() if self._pin_memory else rows
