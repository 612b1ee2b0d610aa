"""How far a long pass over rows has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 15.0


def unseen(rows: int) -> None:
    """Shows nothing."""


@contextmanager
def counted(words: str, *, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Counts rows.

    Args:
        words: what is being done.
        total: rows of the whole.
        console: where to show it.

    Yields:
        The function to call with the number of rows done since the last call.
    """
    if console.is_terminal:
        columns = (TextColumn(words), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(words, total=total)
            yield lambda rows: progress.advance(task, rows)
        return
    done, spoken = 0, time.monotonic()

    def advance(rows: int) -> None:
        nonlocal done, spoken
        done += rows
        if time.monotonic() - spoken >= LINE_SECONDS:
            spoken = time.monotonic()
            console.print(f"{words}: {done:,} of {total:,} rows", highlight=False)

    yield advance
