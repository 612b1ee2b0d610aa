"""Which rows of metrics.csv a long run keeps: all of the newest steps, fewer of older ones, and those of events."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ranker.errors import UserError
from ranker.runs.metric_names import DIVERGENCE, TRAIN_LOSS


@dataclass(frozen=True)
class Thinning:
    """Thins rows by their age, a = newest step - step of the row.

    Rows with a < N = ``keep_steps`` stay. Of older rows one stretch of steps after the other is thinned. Its width is
    the power of 2 that is at most N / ``stretches``, and doubles each time that the age doubles: from age 2^j N on it
    is 2^j times as wide. So a file holds about ``stretches`` stretches per doubling of the run's length: its size grows
    with the logarithm of the number of steps.

    Of a stretch these rows stay, with all their values: the row with the last value of each column (an evaluation, a
    measurement of early signs), the one with the highest training loss, and those of events. A wide stretch consists
    of whole narrow ones, and what it keeps is among what they kept. So the rows that stay depend on the newest step
    alone, and not on when the file was thinned before, or on whether the run was interrupted.

    Attributes:
        keep_steps: N; 0 keeps every row.
        stretches: per doubling of the age.

    Raises:
        UserError: a number out of range.
    """

    keep_steps: int = 10_000
    stretches: int = 512

    def __post_init__(self) -> None:
        if self.keep_steps < 0 or not self.stretches >= 1:
            raise UserError(
                "logger.csv: keep_steps >= 0 (0 keeps every row) and stretches >= 1 are needed, got "
                f"keep_steps={self.keep_steps}, stretches={self.stretches}"
            )

    def stretch(self, step: int, newest: int) -> tuple[int, int]:
        """Width and number of the stretch that holds a row; width 0 where its rows all stay."""
        width, age = 1 << max(0, math.floor(math.log2(max(1.0, self.keep_steps / self.stretches)))), self.keep_steps
        if not self.keep_steps or step < 0:
            return 0, step
        found = 0
        while (step // width + 1) * width <= newest - age:  # the whole stretch is old enough
            found = width
            width, age = 2 * width, 2 * age
        return (found, step // found) if found else (0, step)

    def kept(
        self, rows: Iterable[Mapping[str, Any]], *, newest: int, events: Collection[int]
    ) -> Iterator[Mapping[str, Any]]:
        """The rows that stay.

        Args:
            rows: in the order of steps, without empty cells; each with its ``step``.
            newest: the newest step of the run.
            events: steps whose rows stay.
        """
        for (width, _), found in groupby(rows, key=lambda row: self.stretch(int(row["step"]), newest)):
            if width:
                found = _chosen(list(found), events)
            yield from found


def _chosen(rows: list[Mapping[str, Any]], events: Collection[int]) -> Iterator[Mapping[str, Any]]:
    """The rows of one stretch that stay, in their order."""
    last = {name: place for place, row in enumerate(rows) for name in row if name != "step"}
    highest = max(range(len(rows)), key=lambda place: _height(rows[place].get(TRAIN_LOSS)))
    stay = {*last.values(), highest}
    for place, row in enumerate(rows):
        if place in stay or int(row["step"]) in events or any(name.startswith(DIVERGENCE) for name in row):
            yield row


def _height(loss: Any) -> float:
    """A loss as a number to compare: none is the lowest, NaN the highest."""
    if loss is None:
        return -math.inf
    value = float(loss)
    return math.inf if math.isnan(value) else value
