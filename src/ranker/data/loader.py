"""The loaders for training and evaluation, and the ordered prefetching in threads that both use."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ranker.data.batch import Batch, joined
from ranker.data.dense_statistics import NOTHING, DenseStatistics, PastWindows
from ranker.data.log import Log
from ranker.data.windows import Positions, WindowPlan, share, share_of_groups

T = TypeVar("T")

_TRAIN_TASKS_AHEAD = 2
# Batches of one window are cut together up to so many rows. Each task costs two changes of thread, which a step of a
# small batch would feel.
_ROWS_IN_A_TASK = 4096
_EVAL_BATCHES_AHEAD = 3
_ROWS_AHEAD_IN_BATCHES = 16


@dataclass(frozen=True)
class _Window:
    """The rows of a window that this rank reads in time order, and the random order in which batches take all rows.

    Where dense features are normalised, also their statistics before and after the window.
    """

    rows: Batch
    order: Tensor  # of all rows of the window; with several strips of this rank's rows, counted from its first
    ends: list[int]  # with several strips: how many of this rank's rows the first k batches have
    known: tuple[DenseStatistics, DenseStatistics] | None


_Cut = tuple[list[Batch], tuple[DenseStatistics, DenseStatistics] | None]


class WindowedLoader:
    """One rank's batches of a sequential run, in training order.

    The rows of a batch depend only on the plan, the seed and the batch's number, not on the number of workers or on the
    batch at which the run started. Over all ranks, the batches with one number contain the same rows for any number of
    ranks. Every rank draws ``num_batches`` batches. A rank's share of a small last batch may be empty. Where the plan
    has several strips, a rank reads its own strips only.

    There is no ``__len__`` on purpose: Lightning would assume that the loader always starts at 0.

    Attributes:
        num_batches: number of batches of the whole run, wherever this loader starts.
    """

    def __init__(
        self,
        log: Log,
        *,
        plan: WindowPlan,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        num_workers: int = 1,
        opening: bool = False,
        new_windows: int | None = None,
        pin_memory: bool = False,
        past: PastWindows | None = None,
        keep_group: str | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            log: source of the rows.
            plan: the windows, from ``plan_windows``.
            seed: seed of the order inside each window.
            rank: number of this process.
            world_size: number of processes.
            start_batch: number of the first batch to draw.
            num_workers: threads that read windows ahead (one more cuts them into batches). 0 reads in the caller's
                thread.
            opening: attach this rank's share of each window, in time order, to the window's first batch.
            new_windows: number of first windows whose rows no earlier window had; only they have an opening. None: all.
            pin_memory: pin the batches' memory, for a GPU.
            past: normalise dense features with the statistics before each window, and record new statistics here.
            keep_group: name of a group whose rows stay together, as far as the borders of windows and batches allow.
        """
        assert 0 <= rank < world_size
        self.num_batches = plan.num_batches
        self._log, self._plan, self._seed = log, plan, seed
        self._rank, self._world_size = rank, world_size
        self._next = start_batch
        self._num_workers = num_workers
        self._opening, self._new_windows, self._pin_memory = opening, new_windows, pin_memory
        self._past = past
        self._group = None if keep_group is None else log.schema.group_names.index(keep_group)
        self._jumped = False

    def __iter__(self) -> Iterator[Batch]:
        start = self._next
        while True:
            self._jumped = False
            readers = executor(self._num_workers)
            tasks = self._tasks(start, readers)
            try:
                with closing(in_order(tasks, workers=min(self._num_workers, 1), depth=_TRAIN_TASKS_AHEAD)) as cuts:
                    for batch, known in ((batch, known) for batches, known in cuts for batch in batches):
                        if self._past is not None and known is not None:
                            self._past.note(batch.window, *known)
                        yield batch
                        if self._jumped:
                            break
            finally:
                readers.shutdown(wait=True, cancel_futures=True)
            if not self._jumped:
                return
            start = self._next

    def seek(self, batch: int) -> None:
        """Continues the running iteration (or starts the next one) at another batch. Prefetched batches are dropped."""
        self._next, self._jumped = batch, True

    def _tasks(self, start: int, readers: Executor) -> Iterator[Callable[[], _Cut]]:
        """One task for some batches of a window. Taking a task also starts the prefetch of the next windows."""
        windows: dict[int, Future[_Window]] = {}
        together = max(1, _ROWS_IN_A_TASK // self._plan.batch_size)
        number = start
        while number < self.num_batches:
            window, place = self._plan.locate(number)
            for k in self._wanted(window):
                if k not in windows:
                    windows[k] = self._read_ahead(k, readers, windows.get(k - 1))
            windows = {k: future for k, future in windows.items() if k >= window}
            count = min(together, self._plan.batches(window) - place)
            yield partial(self._cut, windows[window], window, place, number, count)
            number += count

    def _wanted(self, window: int) -> Iterator[int]:
        """The current window and those to prefetch: the next one, and more if windows are small."""
        yield window
        ahead = 0
        while self._num_workers and window + 1 < self._plan.num_windows and ahead < _ROWS_AHEAD_IN_BATCHES:
            window += 1
            ahead += self._plan.batches(window)
            yield window

    def _read_ahead(self, window: int, readers: Executor, previous: Future[_Window] | None) -> Future[_Window]:
        low, high = self._part(window)
        first = self._plan.rows(window)[0]
        start, stop = first + low, first + max(high, low + 1)  # one row for its columns, where there is none
        pieces = max(1, min(self._num_workers, (stop - start) // self._plan.batch_size))
        bounds = [share(stop - start, rank=i, world_size=pieces) for i in range(pieces)]
        # The tasks that _join waits for (the pieces, the previous window) are submitted first, so this cannot deadlock.
        parts = [readers.submit(self._log.read, start + low, start + high) for low, high in bounds]
        return readers.submit(self._join, parts, window, previous)

    def _join(self, parts: list[Future[Batch]], window: int, previous: Future[_Window] | None) -> _Window:
        batches = [part.result() for part in parts]
        rows = Batch.concat(batches) if len(batches) > 1 else batches[0]
        low, high = self._part(window)
        rows = rows if len(rows) == high - low else rows.slice(0, high - low)
        ends: list[int] = []
        if self._plan.strips > 1:
            place = {"rank": self._rank, "world_size": self._world_size}
            mine, counts = self._plan.order_in_strips(window, seed=self._seed, **place)
            order, ends = torch.from_numpy(mine - low), counts.tolist()
        else:
            order = torch.from_numpy(self._plan.order(window, seed=self._seed, keys=self._keys(rows)))
        if self._past is None:
            return _Window(rows, order, ends, None)
        earlier = previous.result().known if previous is not None else None
        before = earlier[1] if earlier is not None else self._past.before(window)
        own = DenseStatistics.of(rows)
        if (window == 0 and not self._past.carried) or not before.rows:  # raw values here would jump afterwards
            return _Window(own.normalise(rows), order, ends, (own, own))
        return _Window(before.normalise(rows), order, ends, (before, before.joined(own)))

    def _part(self, window: int) -> tuple[int, int]:
        return self._plan.part(window, rank=self._rank, world_size=self._world_size)

    def _keys(self, rows: Batch) -> Positions | None:
        """Keys of the group whose rows stay together; None for none."""
        return None if self._group is None or rows.groups_BG is None else rows.groups_BG[:, self._group].numpy()

    def _cut(self, future: Future[_Window], window: int, place: int, number: int, count: int) -> _Cut:
        """Batches ``number`` and the next ones: this rank's shares of the window's batches from ``place`` on."""
        drawn, size = future.result(), self._plan.batch_size
        keys, rank = self._keys(drawn.rows), {"rank": self._rank, "world_size": self._world_size}
        shares = []
        for begin in range(place * size, (place + count) * size, size):
            if drawn.ends:
                shares.append(drawn.order[drawn.ends[begin // size] : drawn.ends[begin // size + 1]])
                continue
            chosen = drawn.order[begin : begin + size]
            low, high = share(len(chosen), **rank) if keys is None else share_of_groups(keys[chosen.numpy()], **rank)
            shares.append(chosen[low:high])
        rows = drawn.rows.take(joined(shares))
        if self._pin_memory:
            rows = rows.pin_memory()
        bounds = list(accumulate(map(len, shares), initial=0))
        batches = [
            replace(rows.slice(low, high), window=window, number=number + i)
            for i, (low, high) in enumerate(pairwise(bounds))
        ]
        if self._opening and place == 0 and (self._new_windows is None or window < self._new_windows):
            part = (0, len(drawn.rows)) if drawn.ends else share(len(drawn.order), **rank)
            opening = drawn.rows.slice(*part)
            batches[0] = replace(batches[0], opening=replace(opening, window=window))
        return batches, drawn.known


class EvalLoader:
    """One rank's share of a range of rows in time order, or of blocks spread evenly over it.

    The rows are blocks of ``batch_size`` consecutive rows. Each rank takes a contiguous part of all their rows, which
    it reads alone, in as many batches as there are blocks.
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
            log: source of the rows.
            start: first row.
            stop: the row after the last.
            batch_size: rows per block, over all ranks.
            max_rows: approximate number of rows to read: whole blocks, at least one, spread evenly. None reads all.
            rank: number of this process.
            world_size: number of processes.
            num_workers: 0 reads in the caller's thread, otherwise one thread prefetches.
            keep: cache the rows after the first pass, for rows that are read repeatedly.
            pin_memory: pin the batches' memory, for a GPU.
            statistics: called at the start of each pass for the statistics that normalise dense features.
        """
        assert 0 <= start <= stop
        blocks = -(-(stop - start) // batch_size)
        chosen = blocks if max_rows is None else min(blocks, max(1, max_rows // batch_size))
        firsts = [start + (i * blocks // chosen) * batch_size for i in range(chosen)]
        self.blocks = [(first, min(first + batch_size, stop)) for first in firsts]
        self._starts = list(accumulate((end - first for first, end in self.blocks), initial=0))
        self._batch_size = batch_size
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
        tasks: Iterator[Callable[[], Batch]] = (partial(self._read, number) for number in range(len(self.blocks)))
        for batch in in_order(tasks, workers=min(self._num_workers, 1), depth=_EVAL_BATCHES_AHEAD):
            if self._keep:
                kept.append(batch)
            yield batch
        if self._keep:
            self._kept = kept

    def _read(self, number: int) -> Batch:
        """Batch ``number`` of this rank: a range of its part of the blocks' rows, counted from the first block's."""
        low, high = share(self._starts[-1], rank=self._rank, world_size=self._world_size)
        size = -(-self._batch_size // self._world_size)
        start, stop = (min(low + i * size, high) for i in (number, number + 1))
        rows = stop - start
        # An empty share still needs the columns, so one row is read and cut off.
        start = start if rows else min(start, self._starts[-1] - 1)
        parts, stop = [], max(stop, start + 1)
        while start < stop:
            block = bisect_right(self._starts, start) - 1
            end, offset = min(stop, self._starts[block + 1]), self.blocks[block][0] - self._starts[block]
            parts.append(self._log.read(start + offset, end + offset))
            start = end
        batch = (Batch.concat(parts) if len(parts) > 1 else parts[0]).slice(0, rows)
        return batch.pin_memory() if self._pin_memory else batch


class Inline(Executor):
    """An executor without workers: it runs a task at once, in the caller's thread."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Runs the task. The returned future is done."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def executor(workers: int) -> Executor:
    """A pool of that many threads. With 0, tasks run in the caller's thread."""
    return ThreadPoolExecutor(workers, thread_name_prefix="ranker-data") if workers else Inline()


def in_order(tasks: Iterable[Callable[[], T]], *, workers: int, depth: int) -> Generator[T, None, None]:
    """Results of tasks in the order of the tasks. The next few are computed ahead.

    A task is started only when a result is taken, so no thread waits for a slow consumer. If the consumer stops early,
    at most ``depth`` tasks are pending. They are cancelled or finished before this generator closes.

    Args:
        tasks: the tasks, iterated in the consumer's thread.
        workers: threads. 0 runs each task when its result is requested.
        depth: maximum number of tasks that are running or whose result is not taken yet.

    Raises:
        Exception: whatever a task raised, in place of its result.
    """
    pool = executor(workers)
    pending: deque[Future[T]] = deque()
    source = iter(tasks)
    try:
        while True:
            while len(pending) < (depth if workers else 1):
                task = next(source, None)
                if task is None:
                    break
                pending.append(pool.submit(task))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
