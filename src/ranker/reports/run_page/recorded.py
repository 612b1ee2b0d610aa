"""Reads everything in a run folder, also of a run that is still running, was killed or diverged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ranker.errors import UserError
from ranker.reports.web.series import Series
from ranker.runs.run_folder import CONFIG, EVENTS, METRICS, SUMMARY, whole_lines


@dataclass(frozen=True)
class Recorded:
    """The contents of one run folder.

    Attributes:
        folder: the run folder.
        config: the resolved configuration; empty if it is missing.
        summary: summary.json; None for a run that is still running or was killed.
        events: the lines of events.jsonl, without an incomplete last line.
        series: the columns of metrics.csv by name.
        age: seconds since the last write.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    events: list[dict[str, Any]]
    series: dict[str, Series]
    age: float

    @classmethod
    def read(cls, folder: str | Path) -> Recorded:
        """Reads the files that exist.

        Raises:
            UserError: none of them exists.
        """
        folder = Path(folder).resolve()
        files = [folder / name for name in (CONFIG, SUMMARY, EVENTS, METRICS)]
        there = [path for path in files if path.is_file()]
        if not there:
            names = ", ".join(path.name for path in files)
            raise UserError(f"report: no run in {folder}: it has none of {names}; give a folder such as runs/NAME")
        config = yaml.safe_load(files[0].read_text(encoding="utf-8")) if files[0] in there else {}
        summary = json.loads(files[1].read_text(encoding="utf-8")) if files[1] in there else None
        return cls(
            folder=folder,
            config=config or {},
            summary=summary,
            events=list(_lines(files[2])) if files[2] in there else [],
            series=_series(files[3]) if files[3] in there else {},
            age=max(0.0, time.time() - max(path.stat().st_mtime for path in there)),
        )

    @property
    def last_step(self) -> int:
        """The last recorded step; at least 1."""
        recorded = [series.steps[-1] for series in self.series.values() if series.steps]
        return max(1, int((self.summary or {}).get("steps") or 0), *recorded)

    def matching(self, prefix: str) -> dict[str, Series]:
        """The series whose names start with a prefix, by the rest of their names, in the order of the file."""
        return {n.removeprefix(prefix): s for n, s in self.series.items() if n.startswith(prefix) and s.steps}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _series(path: Path) -> dict[str, Series]:
    table = pl.read_csv(whole_lines(path), infer_schema=False)
    if "step" not in table.columns:
        return {}
    steps = table["step"].cast(pl.Int64, strict=False)
    found = {}
    for name in table.columns:
        column = table[name]
        there = column.is_not_null() & (column != "") & steps.is_not_null()
        if name != "step" and there.any():
            numbers = [_number(text) for text in column.filter(there)]
            found[name] = Series(steps.filter(there).to_list(), numbers)
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
