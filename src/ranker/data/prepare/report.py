"""What a person sees while data are prepared, and the summary after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ranker.data.manifest import Manifest

Step = Callable[..., AbstractContextManager[Callable[[int], None]]]


@contextmanager
def steps(*, visible: bool) -> Iterator[Step]:
    """A progress bar of several steps.

    Args:
        visible: False shows nothing.

    Yields:
        A function ``step(words, total=None)``: a context manager around one step, which yields the function to call
        with the number of rows done since the last call.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as progress:

        @contextmanager
        def step(words: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            task = progress.add_task(words, total=total)
            yield lambda rows: progress.advance(task, rows)
            done = progress.tasks[task].completed
            progress.update(task, total=done or 1, completed=done or 1)

        yield step


def print_summary(manifest: Manifest, *, where: str, console: Console | None = None) -> None:
    """Prints what a prepared directory holds: rows, days, what was dropped, rates of the labels, notes.

    Args:
        manifest: the directory's manifest, written by a preparation.
        where: the directory.
        console: where to print; standard output where left out.
    """
    console = console or Console(soft_wrap=True)
    source: Mapping[str, Any] = manifest.source
    console.print(f"{where}: {manifest.rows:,} rows in {len(manifest.files)} days")
    console.print(f"read {source['rows_read']:,} rows, dropped {source['duplicates_dropped']:,} exact duplicates")
    table = Table("task", "mean label", title="labels (rate of positives, or mean after the transform)")
    for task in manifest.files[0].label_rates:
        # Days weighed by their rows: exact unless a label is missing on some rows.
        known = [(f.rows, rate) for f in manifest.files if (rate := f.label_rates[task]) is not None]
        rows = sum(n for n, _ in known)
        table.add_row(task, f"{sum(n * r for n, r in known) / rows:.5f}" if rows else "none observed")
    console.print(table)
    for note in source.get("notes", ()):
        console.print(f"note: {note}")
