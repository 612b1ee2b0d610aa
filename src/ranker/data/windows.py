"""The windows of sequential training: a window moves over the log, and batches are drawn at random inside it.

All of this is arithmetic on positions. The plan and a seed determine the rows of every batch, so a run can continue at
any batch, on any number of ranks, without reading earlier rows.

Source: Tang et al., "Improving Training Stability for Multitask Ranking Models in Recommender Systems", KDD 2023,
section 2 (sequential training).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ranker.data.batch import NO_GROUP
from ranker.data.log import Log
from ranker.errors import UserError

Positions = npt.NDArray[np.int64]

_HOUR_MS = 3_600_000
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*h")


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowPlan:
    """The windows and the global batches of a run.

    Window k covers rows ``starts[k] .. starts[k + 1] - 1``. It is cut into global batches of ``batch_size`` rows, of
    which the last may be smaller. Global means over all ranks.

    Attributes:
        starts: int64, shape [W + 1], strictly increasing.
        batch_size: rows of a full global batch.
        windows_before: number of windows of the runs that this one continues. Orders go on from there, so that a run
            of one day draws the batches that a run of all days would.
        strips: number of parts of equal size into which a window is cut in time order. Every batch has an equal share
            of its rows from each strip, in the order of the strips, so that a rank needs to read some strips only.
            Which rows a batch has depends on the number of strips, and not on that of ranks.
    """

    starts: Positions
    batch_size: int
    windows_before: int = 0
    strips: int = 1

    @cached_property
    def _first_batch(self) -> Positions:
        batches = -(-np.diff(self.starts) // self.batch_size)
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(batches)])

    @property
    def num_windows(self) -> int:
        """Number of windows. None of them is empty."""
        return len(self.starts) - 1

    @property
    def num_batches(self) -> int:
        """Number of global batches of all windows. Every rank draws this many."""
        return int(self._first_batch[-1])

    def rows(self, window: int) -> tuple[int, int]:
        """First row of a window and the one after its last."""
        return int(self.starts[window]), int(self.starts[window + 1])

    def locate(self, batch: int) -> tuple[int, int]:
        """The window that a batch is drawn from, and the batch's number within that window."""
        assert 0 <= batch < self.num_batches
        window = int(np.searchsorted(self._first_batch, batch, side="right")) - 1
        return window, batch - int(self._first_batch[window])

    def size(self, batch: int) -> int:
        """Rows of a global batch, over all ranks."""
        window, number = self.locate(batch)
        start, stop = self.rows(window)
        return min(self.batch_size, stop - start - number * self.batch_size)

    def order(self, window: int, *, seed: int, keys: Positions | None = None) -> Positions:
        """The random order of a window's rows, int64 [rows]; of its groups where keys are given."""
        if self.strips > 1:
            return self.order_in_strips(window, seed=seed)[0]
        start, stop = self.rows(window)
        return permutation(seed=seed, window=self.windows_before + window, rows=stop - start, keys=keys)

    def order_in_strips(
        self, window: int, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Positions, Positions]:
        """The random order in which batches take the rows of a rank's strips.

        The first k batches have k B of the N rows of the window. Of the strips up to s, which have b_s rows, they have
        floor(b_s k B / N). So the counts of all strips add up to the size of each batch, each strip is taken in
        proportion to within a row, and no rank needs to see another one's rows.

        Returns:
            The rows in order, int64, counted from the window's first. How many of them the first k batches have,
            int64 [batches + 1].
        """
        start, stop = self.rows(window)
        low, high = share(self.strips, rank=rank, world_size=world_size)
        bounds = (stop - start) * np.arange(low, high + 1, dtype=np.int64) // self.strips
        drawn = np.minimum(np.arange(self.batches(window) + 1, dtype=np.int64) * self.batch_size, stop - start)
        taken = np.diff(bounds * drawn[:, None] // (stop - start), axis=1)  # [batches + 1, strips]
        orders, batches = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for number, (first, after) in enumerate(pairwise(bounds.tolist())):
            key = {"seed": seed, "window": self.windows_before + window, "strip": low + number}
            orders.append(first + in_strip(**key, rows=after - first))
            batches.append(np.repeat(np.arange(len(drawn) - 1), np.diff(taken[:, number])))
        by_batch = np.argsort(np.concatenate(batches), kind="stable")  # inside a batch in the order of the strips
        return np.concatenate(orders)[by_batch], taken.sum(axis=1)

    def part(self, window: int, *, rank: int, world_size: int) -> tuple[int, int]:
        """The rows of a window that a rank reads, counted from its first: its strips, or all if there is one strip."""
        start, stop = self.rows(window)
        if self.strips == 1:
            return 0, stop - start
        low, high = share(self.strips, rank=rank, world_size=world_size)
        return (stop - start) * low // self.strips, (stop - start) * high // self.strips

    def batches(self, window: int) -> int:
        """Number of global batches of a window."""
        return int(self._first_batch[window + 1] - self._first_batch[window])


def plan_windows(log: Log, *, window: int | str, batch_size: int) -> WindowPlan:
    """Divides the training rows of a log into windows.

    Args:
        log: the log. Only its training rows are covered.
        window: a number of rows, rounded up to whole batches so that only the log's last batch is smaller. Or a number
            of hours, such as ``6h``, counted from 1970-01-01 00:00 UTC. The last batch of each such window is smaller.
        batch_size: rows of a global batch.

    Raises:
        UserError: a window or batch size is not above 0, or the window is not a number of rows or hours.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    size = parse_window(window)
    rows = log.train_rows
    if isinstance(size, int):
        step = -(-size // batch_size) * batch_size
        starts = np.arange(0, rows, step, dtype=np.int64)
    elif rows == 0:
        starts = np.zeros(0, dtype=np.int64)
    else:
        span = max(1, round(size * _HOUR_MS))
        first, last = log.time_at_row(0) // span, log.time_at_row(rows - 1) // span
        inner = [log.row_at_time(k * span) for k in range(first + 1, last + 1)]
        # A span without rows gives the same position twice. It gets no window.
        starts = np.unique(np.array([0, *inner], dtype=np.int64))
    return WindowPlan(starts=np.append(starts, np.int64(rows)), batch_size=batch_size)


def parse_window(window: int | str) -> int | float:
    """Parses a window: rows as an int, hours as a float.

    Raises:
        UserError: it is neither.
    """
    if isinstance(window, str) and window.strip().isdigit():
        window = int(window)
    if isinstance(window, int) and not isinstance(window, bool) and window > 0:
        return window
    match = _SPAN.fullmatch(window.strip()) if isinstance(window, str) else None
    if match is None or float(match[1]) <= 0:
        raise UserError(f"window must be a number of rows, such as 65536, or of hours, such as 6h; got {window!r}")
    return float(match[1])


def permutation(*, seed: int, window: int, rows: int, keys: Positions | None = None) -> Positions:
    """A random order of a window's rows, int64 [rows]. It depends only on the seed, the window's number and its rows.

    The counter-based Philox generator is keyed with (seed, window), so no two windows share a stream. The legacy
    ``RandomState`` is used because NumPy guarantees its draws, whereas those of ``Generator`` may change.

    Args:
        seed: seed of the run.
        window: number of the window.
        rows: number of its rows.
        keys: key of each row's group. Then the groups come in a random order, each with all its rows side by side, in a
            random order too. A row without a key is a group of its own.
    """
    key = np.array([seed % 2**64, window], dtype=np.uint64)
    random = np.random.RandomState(np.random.Philox(key=key))
    order = random.permutation(rows)
    if keys is None:
        return order
    known, group = np.unique(keys, return_inverse=True)
    alone = np.flatnonzero(keys == NO_GROUP)
    group[alone] = len(known) + np.arange(len(alone))
    place = random.permutation(len(known) + len(alone))
    return np.lexsort((order, place[group]))


def in_strip(*, seed: int, window: int, strip: int, rows: int) -> Positions:
    """A random order of the rows of a strip, int64 [rows]. As ``permutation``, with a stream for each strip."""
    key = np.array([seed % 2**64, window], dtype=np.uint64)
    counter = np.array([0, 0, 0, strip + 1], dtype=np.uint64)  # streams are 2^192 draws apart
    return np.random.RandomState(np.random.Philox(key=key, counter=counter)).permutation(rows)


def share(rows: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """A rank's contiguous part of rows 0 .. rows - 1. Sizes differ by at most one and may be 0."""
    return rows * rank // world_size, rows * (rank + 1) // world_size


def share_of_groups(keys: Positions, *, rank: int, world_size: int) -> tuple[int, int]:
    """As ``share`` of rows whose groups stand side by side: each cut moves to the nearest place between two groups.

    Args:
        keys: key of each row's group.
        rank: number of the process.
        world_size: number of processes.
    """
    rows = len(keys)
    starts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]) | (keys[1:] == NO_GROUP))) if rows else [0]
    edges = np.append(starts, rows)

    def cut(place: int) -> int:
        after = int(np.searchsorted(edges, place))
        before = edges[max(after - 1, 0)]
        return int(edges[after] if edges[after] - place <= place - before else before)

    low, high = share(rows, rank=rank, world_size=world_size)
    return cut(low), cut(high)


def row_ranges(plan: WindowPlan, *, start: int, stop: int, order: Callable[[int, int, int], Positions]) -> Positions:
    """The log's rows in batches start .. stop - 1, as the smallest number of ranges.

    Args:
        plan: the windows.
        start: first batch.
        stop: the batch after the last.
        order: the order of a window's rows, given its number, its first row and the one after its last.

    Returns:
        int64 [N, 2] in increasing order: first row of a range and the row after its last.
    """
    ranges = [np.zeros((0, 2), dtype=np.int64)]
    batch = start
    while batch < stop:
        window, place = plan.locate(batch)
        end = min(place + stop - batch, plan.batches(window))
        low, high = plan.rows(window)
        drawn = order(window, low, high)
        rows = np.sort(drawn[place * plan.batch_size : end * plan.batch_size]) + low
        breaks = np.flatnonzero(np.diff(rows) != 1)
        ranges.append(np.stack([rows[np.append(0, breaks + 1)], rows[np.append(breaks, len(rows) - 1)] + 1], axis=1))
        batch += end - place
    joined = np.concatenate(ranges)
    if len(joined) == 0:
        return joined
    inner = joined[1:, 0] != joined[:-1, 1]  # adjacent ranges are joined
    return np.stack([joined[np.append(True, inner), 0], joined[np.append(inner, True), 1]], axis=1)
