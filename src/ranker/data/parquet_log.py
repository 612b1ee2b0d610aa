"""A log in a folder of Parquet files. It is read by row group, and only the last few are kept in memory."""

from __future__ import annotations

import datetime as dt
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ranker.data.batch import Batch
from ranker.data.decode import decode
from ranker.data.hold_out import first_held_out
from ranker.data.log import Log
from ranker.data.parquet_index import ParquetIndex, open_index
from ranker.data.row_faults import POLICIES, bad_rows, drop_rows, raise_first, write_quarantine
from ranker.data.schema import Schema
from ranker.data.times import DAY_MS, LONGEST_GAP_MS, check_gap, check_sorted, times_ms
from ranker.errors import UserError, one_of

_KEPT_GROUPS = 2  # a moving window needs the row group that it leaves and the one that it enters


class ParquetLog(Log):
    """Rows of a folder with a schema and Parquet files, whose times do not overlap.

    Opening reads only the footers. Reading decodes whole row groups and caches the last few, so that windows smaller
    than a row group do not decode it repeatedly. Several threads may read at the same time.

    Attributes:
        schema: features and tasks of the rows.
        index: the row groups.
    """

    def __init__(
        self,
        root: str,
        *,
        schema: Schema | None = None,
        eval_days: int = 1,
        hold_out: str | float | None = None,
        days: Sequence[str | dt.date | None] | None = None,
        on_bad_rows: str = "raise",
    ) -> None:
        """Opens a log.

        Args:
            root: a folder or URL, see ``filesystem.open_root``.
            schema: the schema. Default: ``schema.yaml`` in the folder.
            eval_days: number of days (UTC) at the end that are held out.
            hold_out: hours (``6h``) or a share of the rows (0.1) at the end that are held out, in place of eval_days.
            days: first and last day (UTC, ``YYYY-MM-DD``) to use, both included. null for an open end.
            on_bad_rows: ``raise`` raises an error at the first row that cannot be used. ``drop`` keeps the position of
                such a row, but it counts for nothing. ``quarantine`` also writes it to a folder of that name.

        Raises:
            UserError: the files do not match the schema or each other, or no rows are left for training.
        """
        one_of(on_bad_rows, POLICIES, "on_bad_rows")
        self._on_bad_rows = on_bad_rows
        self.index: ParquetIndex = open_index(root, schema=schema)
        self.schema, self._root = self.index.schema, self.index.root
        self._bad_rows: dict[tuple[str, int], int] = {}
        self._groups: OrderedDict[int, Future[Batch]] = OrderedDict()
        self._times: OrderedDict[int, np.ndarray[Any, np.dtype[np.int64]]] = OrderedDict()
        self._lock = threading.Lock()
        self._first, self._stop = 0, self.index.rows
        self._keep_days(days)
        self._check_gaps()
        self._train_rows = self.num_rows  # until the hold-out is known
        self._train_rows = first_held_out(self, eval_days=eval_days, hold_out=hold_out, where=self._root.url)

    @property
    def num_rows(self) -> int:
        """Number of rows of the selected days."""
        return self._stop - self._first

    @property
    def train_rows(self) -> int:
        """Number of rows before the hold-out."""
        return self._train_rows

    @property
    def id_types(self) -> dict[str, str]:
        """By column of a categorical feature, what its ids are: ``string`` or ``integer``."""
        return self.index.id_types

    @property
    def bad_rows(self) -> dict[tuple[str, int], int]:
        """By file and row group, the number of rows dropped there so far because they cannot be used."""
        return self._bad_rows

    @property
    def files(self) -> list[str]:
        """Names of the files that hold rows of the selected days; without a selection all files."""
        if (self._first, self._stop) == (0, self.index.rows):
            return list(self.index.metadata)
        groups = range(self.index.group_of_row(self._first), self.index.group_of_row(self._stop - 1) + 1)
        return sorted({self.index.places[group].file for group in groups})

    def read(self, start: int, stop: int) -> Batch:
        """Rows start .. stop-1 in time order.

        Raises:
            UserError: a file is broken, or a row cannot be used and ``on_bad_rows`` is ``raise``.
        """
        assert 0 <= start < stop <= self.num_rows, f"rows {start} .. {stop} of {self.num_rows}"
        low, high = start + self._first, stop + self._first
        parts = []
        for group in range(self.index.group_of_row(low), self.index.group_of_row(high - 1) + 1):
            begin, end = int(self.index.starts[group]), int(self.index.starts[group + 1])
            batch = self._group(group)
            parts.append(batch.slice(max(low, begin) - begin, min(high, end) - begin))
        return Batch.concat(parts) if len(parts) > 1 else parts[0]

    def row_at_time(self, time_ms: int) -> int:
        """Position of the first row at or after a time (Unix milliseconds). num_rows if there is none."""
        group = self.index.group_of_time(time_ms)
        if group == len(self.index.places):
            return self.num_rows
        row = int(self.index.starts[group])
        if time_ms > self.index.time_min_ms[group]:
            row += int(np.searchsorted(self._group_times(group), time_ms, side="left"))
        return min(max(row - self._first, 0), self.num_rows)

    def time_at_row(self, row: int) -> int:
        """Time of the row at a position (Unix milliseconds)."""
        assert 0 <= row < self.num_rows
        group = self.index.group_of_row(row + self._first)
        return int(self._group_times(group)[row + self._first - self.index.starts[group]])

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is cached, for a process that is started afresh."""
        return {**self.__dict__, "_groups": OrderedDict(), "_times": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _keep_days(self, days: Sequence[str | dt.date | None] | None) -> None:
        if days is None:
            return
        if isinstance(days, str) or len(days) != 2:
            raise UserError(f"days must be [first, last], each YYYY-MM-DD or null, got {days!r}")
        first, last = (_midnight_ms(day) if day is not None else None for day in days)
        low = self.row_at_time(first) if first is not None else 0
        high = self.row_at_time(last + DAY_MS) if last is not None else self.index.rows
        if low >= high:
            there = f"{_day(int(self.index.time_min_ms[0]))} .. {_day(int(self.index.time_max_ms[-1]))}"
            raise UserError(f"days {days[0]} .. {days[1]} hold no rows; the log covers {there}")
        self._first, self._stop = low, high

    def _check_gaps(self) -> None:
        """Refuses selected rows that are years apart, such as one in 2031 or files in two units."""
        index = self.index
        first, last = index.group_of_row(self._first), index.group_of_row(self._stop - 1)
        for group in range(first, last + 1):
            place = index.places[group]
            if group > first:
                check_gap(
                    int(index.time_max_ms[group - 1]),
                    int(index.time_min_ms[group]),
                    schema=self.schema,
                    place=place,
                    what="begins at",
                )
            if index.time_max_ms[group] - index.time_min_ms[group] > LONGEST_GAP_MS:
                start = int(index.starts[group])
                low, high = max(self._first - start, 0), self._stop - start
                times = self._group_times(group)[low:high]
                row = int(np.argmax(np.diff(times))) + 1 if len(times) > 1 else 0
                check_gap(
                    int(times[row - 1]) if row else int(times[0]),
                    int(times[row]),
                    schema=self.schema,
                    place=place,
                    what=f"row {low + row} is at",
                )

    def _group_times(self, group: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Times of a row group's rows, int64, Unix milliseconds. The last few are cached."""
        with self._lock:
            if group in self._times:
                self._times.move_to_end(group)
                return self._times[group]
        name, place = self.schema.time_column, self.index.places[group]
        column = self.index.read(group, [name])[name]
        times = np.concatenate([times_ms(chunk, self.schema, place) for chunk in column.chunks])
        check_sorted(times, schema=self.schema, place=place, url=self._root.url)
        with self._lock:
            self._times[group] = times
            if len(self._times) > _KEPT_GROUPS:
                self._times.popitem(last=False)
        return times

    def _group(self, group: int) -> Batch:
        """A decoded row group. Two threads that need the same one share the work."""
        with self._lock:
            future = self._groups.get(group)
            mine = future is None
            if future is None:
                future = self._groups[group] = Future()
                if len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
        if mine:
            try:
                future.set_result(self._decode(group))
            except BaseException as error:
                with self._lock:
                    self._groups.pop(group, None)
                future.set_exception(error)
        return future.result()

    def _decode(self, group: int) -> Batch:
        place = self.index.places[group]
        table = self.index.read(group, self.schema.columns())
        first_row = int(self.index.starts[group]) - self._first
        batch, faults = decode(table, schema=self.schema, first_row=first_row, place=place)
        check_sorted(batch.time_ms_B.numpy(), schema=self.schema, place=place, url=self._root.url)
        if faults:
            if self._on_bad_rows == "raise":
                raise_first(faults, place)
            if self._on_bad_rows == "quarantine":
                write_quarantine(self._root, place, table, faults)
            bad = bad_rows(faults)
            self._bad_rows[place.file, place.row_group] = len(bad)
            batch = drop_rows(batch, bad)
        return batch


def _midnight_ms(day: str | dt.date) -> int:
    try:
        date = day if isinstance(day, dt.date) else dt.date.fromisoformat(str(day))
    except ValueError as error:
        raise UserError(f"days: '{day}' is not a day; write YYYY-MM-DD") from error
    return (date - dt.date(1970, 1, 1)).days * DAY_MS


def _day(time_ms: int) -> str:
    return (dt.date(1970, 1, 1) + dt.timedelta(milliseconds=time_ms)).isoformat()
