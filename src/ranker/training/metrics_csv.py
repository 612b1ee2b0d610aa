"""metrics.csv: one row per step that logged something, appended to as training goes on."""

from __future__ import annotations

import csv
import heapq
import io
import shutil
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker.atomic import replacing
from ranker.errors import UserError
from ranker.runs.metric_names import DIVERGENCE
from ranker.training.row_thinning import Thinning

FLUSH_SECONDS = 5.0
OPEN_ROWS = 64  # newest rows, which may still get values
LEAST_THINNED = 1000  # a file with fewer rows is not thinned before the run ends


class MetricsCsv(Logger):
    """Lightning logger with one row per step and one column per metric, rows in the order of steps.

    The values of a step do not all come at once: those of the hold-out follow the training row. So the newest rows stay
    open: they are in memory as well as at the end of the file. Older rows are only in the file. New rows are appended.
    An open row that has changed since it was written, a new column, or a value for an older row makes an atomic copy of
    the file. A process killed while it appends leaves at most a last line that is cut off; readers drop it
    (``whole_lines``).

    Lightning's CSVLogger starts a new file when a run resumes. This one keeps the rows up to the step that the run
    resumes from and drops later ones, so that no step occurs twice.

    Old rows are thinned whenever the file has twice as many rows as were left the last time, and when the run ends. So
    a long run has a file of bounded size, and a row costs the same at its end as at its beginning.

    Args:
        path: the file.
        thinning: which rows stay.
    """

    def __init__(self, path: Path, thinning: Thinning = Thinning()) -> None:  # noqa: B008  # it is immutable
        super().__init__()
        self.path, self._thinning = path, thinning
        self._events: set[int] = set()  # steps that an event names
        self._closed_rows = 0  # rows of the file before the open ones
        self._left = 0  # rows that the last thinning left
        self._newest, self._thinned_at = -1, -1  # newest step, and that of the last thinning
        self._columns: dict[str, None] = {"step": None}  # in order
        self._in_header = 0  # columns that the file has
        self._rows: dict[int, dict[str, Any]] = {}  # open rows by step
        self._written = b""  # open rows as the file has them
        self._closed_bytes, self._closed_step = 0, -1  # where the open rows begin, and the step of the row before them
        self._flush_at = time.monotonic() + FLUSH_SECONDS

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """One version, because a run has one file."""
        return ""

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Keeps the rows up to a step."""
        if not self.path.is_file():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            self._columns = dict.fromkeys(next(csv.reader(file), ["step"]))
        for row in self._in_file(step):
            self._remember(int(row["step"]), row)
        self._rebuild(until=step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds to the row of a step."""
        step = step or 0
        if time.monotonic() > self._flush_at and step > max(self._rows, default=-1):
            self.save()  # between two steps, so that the last row is complete and can be appended
        self._rows.setdefault(step, {"step": step}).update(metrics)
        self._columns.update(dict.fromkeys(metrics))
        self._remember(step, metrics)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: hyperparameters are in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Brings the file up to date. Leaves the file of an earlier run as it is while nothing was logged.

        Raises:
            UserError: it cannot be written, for example because the disk is full. The rows are kept for the next call.
        """
        self._save(thin=len(self._rows) + self._closed_rows >= 2 * max(self._left, LEAST_THINNED))

    def _save(self, *, thin: bool) -> None:
        if not self._rows and self.path.is_file():
            return
        thin = thin and 0 < self._thinning.keep_steps < self._newest and self._thinned_at != self._newest
        late = any(step <= self._closed_step for step in self._rows)
        try:
            if thin or late or len(self._columns) != self._in_header or not self.path.is_file():
                self._rebuild(thin=thin)
            else:
                self._extend()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}; free space, then resume the run"
            ) from error
        self._flush_at = time.monotonic() + FLUSH_SECONDS

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes what is left. After a failure, a second one is only said: the first is the reason that is shown."""
        try:
            self._save(thin=True)
        except UserError as error:
            if status == "success":
                raise
            print(error, file=sys.stderr, flush=True)

    def _remember(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keeps the newest step, and the steps that events name."""
        self._newest = max(self._newest, step)
        self._events.update(int(float(value)) for name, value in metrics.items() if name.startswith(DIVERGENCE))

    def _extend(self) -> None:
        """Appends what the file has not; copies it if an open row has changed."""
        rows = [(row, self._line(row)) for _, row in sorted(self._rows.items())]
        lines = b"".join(line for _, line in rows)
        whole = self.path.stat().st_size == self._closed_bytes + len(self._written)
        if whole and lines.startswith(self._written):
            with self.path.open("ab") as file:
                file.write(lines[len(self._written) :])
        else:
            with replacing(self.path) as temporary, self.path.open("rb") as old, temporary.open("wb") as file:
                shutil.copyfileobj(old, file)
                file.truncate(self._closed_bytes)
                file.seek(self._closed_bytes)
                file.write(lines)
        self._keep_open(rows)

    def _rebuild(self, until: int | None = None, *, thin: bool = False) -> None:
        """Writes the file anew from its own rows (up to a step) and the open ones, with all columns."""
        rows: Iterator[Mapping[str, Any]]
        rows = _merged(self._in_file(until), [row for _, row in sorted(self._rows.items())])
        if thin:
            rows = self._thinning.kept(rows, newest=self._newest, events=self._events)
        written = 0
        newest: deque[tuple[dict[str, Any], bytes]] = deque()
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            size, step = file.write(self._line(dict(zip(self._columns, self._columns, strict=True)))), -1
            for row in rows:
                written += 1
                newest.append((dict(row), self._line(row)))
                file.write(newest[-1][1])
                if len(newest) > OPEN_ROWS:
                    closed, line = newest.popleft()
                    size, step = size + len(line), int(closed["step"])
        self._in_header = len(self._columns)
        self._closed_bytes, self._closed_step, self._closed_rows = size, step, written - len(newest)
        if thin:
            self._left, self._thinned_at = written, self._newest
        self._keep_open(list(newest))

    def _keep_open(self, rows: list[tuple[dict[str, Any], bytes]]) -> None:
        """Keeps the newest of the rows that were written, and forgets the others."""
        closed, newest = rows[:-OPEN_ROWS], rows[-OPEN_ROWS:]
        if closed:
            self._closed_bytes += sum(len(line) for _, line in closed)
            self._closed_step = int(closed[-1][0]["step"])
            self._closed_rows += len(closed)
        self._rows = {int(row["step"]): row for row, _ in newest}
        self._written = b"".join(line for _, line in newest)

    def _line(self, row: Mapping[str, Any]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text).writerow(map(row.get, self._columns))
        return text.getvalue().encode()

    def _in_file(self, until: int | None) -> Iterator[dict[str, Any]]:
        """The rows of the file, without empty cells and without a last line that was cut off."""
        if not self.path.is_file():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(line for line in file if line.endswith("\n")):
                if until is None or int(row["step"]) <= until:
                    yield {name: value for name, value in row.items() if value}


def rows_until(path: Path, step: int) -> Iterator[tuple[int, dict[str, float]]]:
    """The rows of a file up to a step, as numbers. Nothing where there is no file."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):
            at = int(row.pop("step"))
            if at <= step:
                yield at, {name: float(value) for name, value in row.items() if value}


def has_values(path: Path, step: int, prefix: str) -> bool:
    """Whether the row of a step has a value in a column whose name starts with a prefix."""
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):
            if row["step"] == str(step):
                return any(value for name, value in row.items() if name.startswith(prefix))
    return False


def _merged(older: Iterable[dict[str, Any]], newer: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows in the order of steps; of the same step one, in which newer values win."""
    last: dict[str, Any] | None = None
    for row in heapq.merge(older, newer, key=lambda row: int(row["step"])):
        if last is not None and int(last["step"]) == int(row["step"]):
            last.update(row)
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last
