"""The one thing every source of data looks like: rows in time order that can be read by position."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ranker.data.batch import Batch
from ranker.data.schema import Schema


@runtime_checkable
class Log(Protocol):
    """A time-ordered log. Reading is deterministic, and any position is found without replaying what lies before.

    Attributes:
        schema: what the rows hold.
        train_rows: number of rows to train on; positions 0 .. train_rows - 1.
        num_rows: all rows; the last day (or hold-out), which is evaluated, is train_rows .. num_rows - 1.
    """

    schema: Schema

    @property
    def train_rows(self) -> int: ...  # noqa: D102

    @property
    def num_rows(self) -> int: ...  # noqa: D102

    def read(self, start: int, stop: int) -> Batch:
        """Rows start .. stop-1 in time order, on the CPU, with ``row_B`` and ``time_ms_B`` set."""
        ...

    def row_at_time(self, time_ms: int) -> int:
        """Position of the first row at or after a time (Unix milliseconds); num_rows where there is none."""
        ...

    def time_at_row(self, row: int) -> int:
        """Time of the row at a position (Unix milliseconds)."""
        ...
