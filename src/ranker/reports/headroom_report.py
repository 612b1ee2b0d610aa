"""The report of a search for the largest stable learning rate: terminal tables, JSON, CSV and a figure."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ranker.atomic import replacing, write_text
from ranker.reports.curves import COLOURS
from ranker.runs.run_folder import plain
from ranker.stability.lr_headroom import Headroom, Level, Outcome, headroom, settled, survival

JSON, CSV, PICTURE = "headroom.json", "headroom.csv", "headroom.png"


@dataclass
class Entry:
    """One candidate, such as one optimizer, and the results of its runs.

    Attributes:
        label: the overrides that differ between candidates; empty for a single one.
        overrides: common to all its runs.
        min_auc: a run with a lower AUC can count as lost; see ``settled``.
        confidence: of the intervals.
        runs: outcome and summary of each run so far.
    """

    label: str
    overrides: list[str]
    min_auc: float
    confidence: float
    runs: list[tuple[Outcome, Mapping[str, Any]]] = field(default_factory=list)

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes of the runs so far."""
        return settled([outcome for outcome, _ in self.runs], min_auc=self.min_auc)

    @cached_property
    def levels(self) -> Sequence[Level]:
        """The survival curve, one level per learning rate. Computed once; read it only when all runs have ended."""
        return survival(self.outcomes, confidence=self.confidence)

    @cached_property
    def found(self) -> Headroom | None:
        """The largest stable learning rate in multiples of 1x; None if no run completed or diverged. Computed once."""
        return headroom(self.outcomes, confidence=self.confidence)

    @property
    def results(self) -> list[tuple[Outcome, Mapping[str, Any]]]:
        """The outcomes with the summaries of their runs."""
        return [(outcome, summary) for outcome, (_, summary) in zip(self.outcomes, self.runs, strict=True)]

    @property
    def failures(self) -> list[Outcome]:
        """Failed runs, which tell nothing about stability."""
        return [outcome for outcome in self.outcomes if outcome.survived is None]

    def notes(self) -> list[str]:
        """Warnings about the result, one line each."""
        notes = []
        if self.found is not None and not self.found.monotone:
            notes.append("a learning rate survived more often than a lower one: use more seeds")
        if self.found is not None and self.found.beyond == "above":
            notes.append("most runs survive even at the highest rate tried: raise headroom.highest")
        if self.found is not None and self.found.beyond == "below":
            notes.append("most runs are lost even at the lowest rate tried: lower headroom.lowest")
        if self.failures:
            first = self.failures[0]
            notes.append(f"{len(self.failures)} runs failed and are not counted, the first: {first.reason}")
        return notes


def report(entries: Sequence[Entry], folder: Path, *, confidence: float, console: Console | None = None) -> None:
    """Prints survival curves and headrooms. If there is any run, writes headroom.json, headroom.csv and headroom.png.

    Args:
        entries: one per candidate.
        folder: where the files go.
        confidence: of the intervals.
        console: where to print; standard output by default.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    known = [(entry, entry.found) for entry in entries if entry.found is not None]
    for entry in entries:
        if entry.levels:
            console.print(curve_table(entry))
        for note in entry.notes():
            console.print(f"{entry.label + ': ' if entry.label else ''}{note}", style="yellow")
    if len(entries) > 1 and known:
        console.print(comparison_table(known, confidence=confidence))
    for entry in entries:
        of = f" of {entry.label}" if entry.label else ""
        unknown = "not known, every run failed" if entry.outcomes else "not known, no round has ended"
        value = unknown if entry.found is None else str(entry.found)
        console.print(f"lr headroom{of}: {value}", style="bold")
    if not any(entry.outcomes for entry in entries):
        return
    write_text(folder / JSON, json.dumps(plain(as_dict(entries, confidence=confidence)), indent=2) + "\n")
    write_runs(entries, folder / CSV)
    names = [CSV, JSON]
    if known:
        plot(known, folder / PICTURE, confidence=confidence)
        names.append(PICTURE)
    console.print(f"{folder}: {', '.join(names)}")


def curve_table(entry: Entry) -> Table:
    """The survival curve of one entry."""
    table = Table(title=f"survival {entry.label}".strip(), title_justify="left")
    for name in ("lr", "survived", "share", "interval of the share"):
        table.add_column(name, justify="right", no_wrap=True)
    for level in entry.levels:
        interval = f"{level.low:.2f} to {level.high:.2f}"
        table.add_row(f"{level.rate:g}x", f"{level.survived} of {level.runs}", f"{level.share:.2f}", interval)
    return table


def comparison_table(entries: Sequence[tuple[Entry, Headroom]], *, confidence: float) -> Table:
    """One row per entry, with the ratio to the first entry."""
    table = Table(title=f"lr headroom, {100 * confidence:g} % intervals", title_justify="left")
    for name in ("", "headroom", "beside the first", "runs"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    first = entries[0][1]
    for entry, found in entries:
        sure = not found.beyond and not first.beyond
        times = found.value / first.value
        ratio = (f"{times:.2f}x" if times < 100 else f"{times:,.0f}x") if sure else ""
        table.add_row(entry.label, str(found), ratio, str(len(entry.outcomes)))
    return table


def as_dict(entries: Sequence[Entry], *, confidence: float) -> dict[str, Any]:
    """The contents of headroom.json."""
    return {
        "confidence": confidence,
        "entries": [
            {
                "label": entry.label,
                "overrides": list(entry.overrides),
                "headroom": None if entry.found is None else asdict(entry.found),
                "notes": entry.notes(),
                "levels": [asdict(level) for level in entry.levels],
                "runs": [
                    {**asdict(outcome), "steps": summary.get("steps"), "run": summary.get("run")}
                    for outcome, summary in entry.results
                ],
            }
            for entry in entries
        ],
    }


def write_runs(entries: Sequence[Entry], path: Path) -> None:
    """Writes headroom.csv, one row per run."""
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "lr_mult", "seed", "outcome", "auc", "steps", "reason", "run"])
        for entry in entries:
            for outcome, summary in entry.results:
                word = {True: "survived", False: "lost", None: "failed"}[outcome.survived]
                auc = "" if math.isnan(outcome.auc) else outcome.auc
                row = [outcome.rate, outcome.seed, word, auc, summary.get("steps"), outcome.reason, summary.get("run")]
                writer.writerow([entry.label, *row])


def plot(entries: Sequence[tuple[Entry, Headroom]], path: Path, *, confidence: float) -> None:
    """Draws the share of surviving runs over the learning rate, with the headroom and its interval."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    others = iter(["#1e8449", "#2e4053", "#af601a", "#884ea0", "#148f77"])
    for place, (entry, found) in enumerate(entries):
        rates = [level.rate for level in entry.levels]
        name = next((word.split("=", 1)[1] for word in entry.overrides if word.startswith("optim=")), "")
        colour = COLOURS.get(name) or next(others, None)
        shift = 1.0 + 0.02 * place  # so that error bars of several entries do not overlap
        at = [rate * shift for rate in rates]
        shares = [level.survived / level.runs for level in entry.levels]
        below = [share - level.low for share, level in zip(shares, entry.levels, strict=True)]
        above = [level.high - share for share, level in zip(shares, entry.levels, strict=True)]
        axes.errorbar(at, shares, [below, above], fmt="o", color=colour, capsize=2, linewidth=0.8, markersize=4)
        label = f"{entry.label}: {found}" if entry.label else str(found)
        axes.plot(rates, [level.share for level in entry.levels], color=colour, label=label)
        axes.axvline(found.value, color=colour, linestyle=":", linewidth=1.0)
        low = max(found.low, min(rates))
        axes.axvspan(low, min(found.high, max(rates)), color=colour, alpha=0.08, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel("learning rate, in multiples of 1x")
    axes.set_ylabel("share of runs that survive")
    axes.set_title(f"lr headroom, {100 * confidence:g} % intervals", loc="left")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)  # below the curves
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with replacing(path) as draft:
        figure.savefig(draft, dpi=150, format=path.suffix[1:])
    pyplot.close(figure)
