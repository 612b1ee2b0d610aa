"""What the benchmark scripts say in the end: a table, a JSON file of the same rows, and an exit status."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """One number of the table. ``ok`` is None where there is no target."""

    name: str
    value: float
    unit: str
    target: str = ""
    ok: bool | None = None


def limited(name: str, value: float, limit: float) -> Line:
    """A ratio that is met where it is at most the limit."""
    return Line(name, value, "ratio", f"<= {limit:g}", value <= limit)


def finish(lines: Sequence[Line], path: Path | None) -> int:
    """Writes the lines as JSON; returns the exit status, 1 where a target is missed."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n", encoding="utf-8")
    return int(any(line.ok is False for line in lines))


def met(line: Line) -> str:
    """The last column of a table in Markdown."""
    return "" if line.ok is None else "yes" if line.ok else "NO"


def report(lines: Sequence[Line], path: Path | None, *, title: str = "") -> int:
    """Prints the lines and writes them as JSON.

    Args:
        lines: the rows, in order.
        path: where the JSON goes; None for nowhere.
        title: above the table.

    Returns:
        The exit status: 1 where a target is missed.
    """
    from rich.console import Console  # here: bench_optim.py also runs where torch is all there is
    from rich.table import Table

    table = Table("what", "value", "unit", "target", "ok", title=title)
    for line in lines:
        mark = "" if line.ok is None else "yes" if line.ok else "[red]no"
        value = f"{line.value:,.3g}" if line.value < 1000 else f"{line.value:,.0f}"
        table.add_row(line.name, value, line.unit, line.target, mark)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)
    console.print(table)
    return finish(lines, path)
