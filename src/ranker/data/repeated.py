"""Several passes over a small log: its training rows repeated, as a loader of training batches reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ranker.data.batch import Batch
from ranker.data.log import Log
from ranker.data.windows import Positions, WindowPlan


class Repeated(Log):
    """The training rows of a log, several times. Position p stands for row p modulo the number of training rows.

    Args:
        log: the log.
        passes: how often.
    """

    def __init__(self, log: Log, passes: int) -> None:
        self.schema = log.schema
        self._log, self._passes = log, passes

    @property
    def train_rows(self) -> int:
        """Number of training rows of all passes."""
        return self._passes * self._log.train_rows

    @property
    def num_rows(self) -> int:
        """The same: the hold-out is read from the log itself."""
        return self.train_rows

    @property
    def bad_rows(self) -> dict[tuple[str, int], int]:
        """As in the log."""
        return self._log.bad_rows

    def read(self, start: int, stop: int) -> Batch:
        """Rows of one pass. A window never covers rows of two."""
        first = start // self._log.train_rows * self._log.train_rows
        return self._log.read(start - first, stop - first)

    def row_at_time(self, time_ms: int) -> int:
        """Position in the first pass."""
        return min(self._log.row_at_time(time_ms), self._log.train_rows)

    def time_at_row(self, row: int) -> int:
        """Time of the row that a position stands for."""
        return self._log.time_at_row(row % self._log.train_rows)


def repeated_plan(plan: WindowPlan, passes: int) -> WindowPlan:
    """The windows of one pass, several times. Each pass draws in an order of its own: orders depend on the window."""
    rows = plan.starts[-1]
    starts = [plan.starts[:-1] + number * rows for number in range(passes)]
    return replace(plan, starts=np.append(np.concatenate(starts), passes * rows))


def in_one_pass(ranges: Positions, rows: int) -> Positions:
    """Ranges of positions as ranges of the log's rows, in the order of the positions.

    Args:
        ranges: int64 [N, 2], first position and the one after the last.
        rows: number of training rows of the log.
    """
    found = []
    for start, stop in ranges.tolist():
        while start < stop:
            end = min(stop, (start // rows + 1) * rows)
            found.append((start % rows, (end - 1) % rows + 1))
            start = end
    return np.array(found, dtype=np.int64).reshape(-1, 2)
