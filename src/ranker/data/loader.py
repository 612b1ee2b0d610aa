"""The training loader: batches drawn at random inside a window that moves over the log, read ahead in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ranker.data.batch import Batch
from ranker.data.dense_statistics import DenseStatistics, PastWindows
from ranker.data.log import Log
from ranker.data.prefetch import executor, in_order
from ranker.data.windows import WindowPlan, permutation, share

_BATCHES_AHEAD = 4
_ROWS_AHEAD_IN_BATCHES = 16


@dataclass(frozen=True)
class _Window:
    """A window's rows in time order, and the random order in which batches take them.

    Where dense features are normalised, also what is known of them before and after the window.
    """

    rows: Batch
    order: Tensor
    known: tuple[DenseStatistics, DenseStatistics] | None


_Cut = tuple[Batch, tuple[DenseStatistics, DenseStatistics] | None]


class WindowedLoader:
    """One rank's batches of a sequential run, in training order.

    Which rows a batch holds depends on the plan, the seed and the batch's number alone: not on the number of workers,
    nor on where the run began. Over all ranks, the batches with one number hold the same rows for any number of
    ranks. Every rank draws ``num_batches`` batches; the share of a rank in a small last batch may be empty.

    There is no ``__len__`` on purpose: Lightning would take the loader for one that always starts at 0.

    Attributes:
        num_batches: batches from the first of the run to its end, wherever this loader starts.
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
        max_batches: int | None = None,
        num_workers: int = 1,
        opening: bool = False,
        pin_memory: bool = False,
        past: PastWindows | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            log: where the rows come from.
            plan: the windows, from ``plan_windows``.
            seed: decides the order inside each window.
            rank: number of this process.
            world_size: number of processes.
            start_batch: number of the first batch to draw.
            max_batches: stop after so many; None goes to the end.
            num_workers: threads that read windows ahead (one more cuts them into batches); 0 reads in line.
            opening: give the first batch of each window this rank's share of the window, in time order.
            pin_memory: pin the batches' memory, for a GPU.
            past: normalise dense features with what was known before each window, and note here what is learnt.
        """
        assert 0 <= rank < world_size
        self.num_batches = plan.num_batches
        self._log, self._plan, self._seed = log, plan, seed
        self._rank, self._world_size = rank, world_size
        self._next = start_batch
        self._stop = plan.num_batches if max_batches is None else min(plan.num_batches, start_batch + max_batches)
        self._num_workers = num_workers
        self._opening, self._pin_memory = opening, pin_memory
        self._past = past
        self._jumped = False

    def __iter__(self) -> Iterator[Batch]:
        start = self._next
        while True:
            self._jumped = False
            readers = executor(self._num_workers)
            tasks = self._tasks(start, readers)
            try:
                with closing(in_order(tasks, workers=min(self._num_workers, 1), depth=_BATCHES_AHEAD)) as batches:
                    for batch, known in batches:
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
        """Makes the running iteration (or the next one) go on with another batch; what was read ahead is dropped."""
        self._next, self._jumped = batch, True

    def _tasks(self, start: int, readers: Executor) -> Iterator[Callable[[], _Cut]]:
        """How to make each batch; asking for one has the windows that come next read ahead."""
        windows: dict[int, Future[_Window]] = {}
        for number in range(start, self._stop):
            window, place = self._plan.locate(number)
            for k in self._wanted(window):
                if k not in windows:
                    windows[k] = self._read_ahead(k, readers, windows.get(k - 1))
            windows = {k: future for k, future in windows.items() if k >= window}
            yield partial(self._cut, windows[window], window, place, number)

    def _wanted(self, window: int) -> Iterator[int]:
        """The window batches are drawn from, and those to read ahead: the next, and more where windows are small."""
        yield window
        last, _ = self._plan.locate(self._stop - 1)
        ahead = 0
        while self._num_workers and window < last and ahead < _ROWS_AHEAD_IN_BATCHES:
            window += 1
            ahead += self._plan.batches(window)
            yield window

    def _read_ahead(self, window: int, readers: Executor, previous: Future[_Window] | None) -> Future[_Window]:
        start, stop = self._plan.rows(window)
        pieces = max(1, min(self._num_workers, (stop - start) // self._plan.batch_size))
        bounds = [share(stop - start, rank=i, world_size=pieces) for i in range(pieces)]
        # What a task waits for (its pieces, the window before) enters the readers' queue first, so it cannot be kept
        # from running.
        parts = [readers.submit(self._log.read, start + low, start + high) for low, high in bounds]
        return readers.submit(self._join, parts, window, stop - start, previous)

    def _join(self, parts: list[Future[Batch]], window: int, size: int, previous: Future[_Window] | None) -> _Window:
        batches = [part.result() for part in parts]
        rows = Batch.concat(batches) if len(batches) > 1 else batches[0]
        order = torch.from_numpy(permutation(seed=self._seed, window=window, rows=size))
        if self._past is None:
            return _Window(rows, order, None)
        earlier = previous.result().known if previous is not None else None
        before = earlier[1] if earlier is not None else self._past.before(window)
        return _Window(before.normalise(rows), order, (before, before.joined(DenseStatistics.of(rows))))

    def _cut(self, future: Future[_Window], window: int, place: int, number: int) -> _Cut:
        """Batch ``number``: this rank's share of the window's batch at ``place``."""
        drawn, size = future.result(), self._plan.batch_size
        begin, end = place * size, min((place + 1) * size, len(drawn.order))
        low, high = share(end - begin, rank=self._rank, world_size=self._world_size)
        batch = drawn.rows.take(drawn.order[begin + low : begin + high])
        if self._pin_memory:
            batch = batch.pin_memory()
        opening = None
        if self._opening and place == 0:
            opening = drawn.rows.slice(*share(len(drawn.order), rank=self._rank, world_size=self._world_size))
            opening = replace(opening, window=window)
        return replace(batch, window=window, number=number, opening=opening), drawn.known
