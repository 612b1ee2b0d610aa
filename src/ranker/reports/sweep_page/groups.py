"""Runs in groups: a group is one configuration but for its seed, a panel the groups that are drawn together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ranker.reports.comparison import ORDER, ordered
from ranker.reports.run_table import CELL, setting_names, useless_tasks

LOST = ("diverged", "unsettled")  # verdicts on the model; failed and interrupted runs say nothing about it
PANEL = ("data", "scale", "model", "mitigation")
STYLES = 9  # colours of the style sheet


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: the name of its folder.
        row: its row in the table of ``load_runs``.
        useless: tasks at which it is no better than a constant prediction.
    """

    name: str
    row: dict[str, Any]
    useless: tuple[str, ...]

    @property
    def lost(self) -> bool:
        """Whether it diverged, or training ended during a divergence."""
        return self.row["status"] in LOST

    @property
    def completed(self) -> bool:
        """Whether it ended as planned, with a model that did not diverge."""
        return self.row["status"] == "completed"

    @property
    def folder(self) -> Path | None:
        """Its folder; None for a run from a CSV file or a tracker."""
        return Path(self.row["folder"]) if self.row.get("folder") else None

    def value(self, metric: str) -> float:
        """A metric on the hold-out at the end; nan where there is none."""
        found = self.row.get(metric)
        return math.nan if found is None else float(found)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one configuration but for the seed.

    Attributes:
        optim: their optimizer, which decides the colour.
        lr_mult: their learning rate, as a multiple of the base learning rate.
        settings: what else tells them from other groups of the panel, such as ``lambda_abs 0.01``; may be empty.
        runs: the runs.
    """

    optim: str
    lr_mult: float
    settings: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """Its words in a legend, without the learning rate."""
        return " ".join(filter(None, (self.optim, self.settings)))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The groups of one data set, scale, model and mitigation.

    Attributes:
        title: what they have in common.
        groups: by optimizer, then learning rate, then settings.
    """

    title: str
    groups: tuple[Group, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs of its groups."""
        return [run for group in self.groups for run in group.runs]

    @property
    def rates(self) -> list[float]:
        """The learning rates of its groups, as multiples, ascending."""
        return sorted({group.lr_mult for group in self.groups})


def panels(table: pl.DataFrame) -> list[Panel]:
    """Sorts the runs of ``load_runs`` into panels and groups."""
    if "mitigation" not in table.columns:
        table = table.with_columns(mitigation=pl.lit("none"))
    table = table.with_columns(pl.col("mitigation").fill_null("none"))
    settings = setting_names(table)
    tasks = useless_tasks(table)
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Run]]] = {}
    for row, useless in zip(table.iter_rows(named=True), tasks, strict=True):
        run = Run(name=row["run"], row=row, useless=tuple(useless) if row["status"] == "completed" else ())
        key = (*(row[name] for name in CELL), *(row[name] for name in settings), row.get("cell"))
        found.setdefault(tuple(row[name] for name in PANEL), {}).setdefault(key, []).append(run)
    rank = {name: place for place, name in enumerate(ORDER["model"])}
    keys = sorted(found, key=lambda k: (*k[:2], rank.get(k[2], len(rank)), str(k[2]), k[3] != "none", str(k[3])))
    several = len({key[:2] for key in keys}) > 1
    made = []
    for key in keys:
        groups = [_group(runs, settings) for runs in found[key].values()]
        order = {name: place for place, name in enumerate(optimizers(table))}
        groups.sort(key=lambda group: (order[group.optim], group.lr_mult, group.settings))
        title = ", ".join([*([f"{key[0]}, {key[1]} scale"] if several else []), str(key[2])])
        made.append(Panel(title=title + (f", {key[3]}" if key[3] != "none" else ""), groups=tuple(groups)))
    return made


def optimizers(table: pl.DataFrame) -> list[str]:
    """The optimizers of a table, those of the paper first."""
    return ordered(table["optim"].unique().to_list(), ORDER["optim"])


def styles(names: Sequence[str]) -> dict[str, str]:
    """The CSS classes of each optimizer: a colour, and ``g0``, ``g1``, ... by which the page hides it."""
    return {name: f"s{place % STYLES} g{place}" for place, name in enumerate(names)}


def _group(runs: list[Run], settings: Sequence[str]) -> Group:
    row = runs[0].row
    words = [f"{name.split('.', 1)[1]} {row[name]}" for name in settings if row[name] is not None]
    runs = sorted(runs, key=lambda run: run.row["seed"] or 0)
    return Group(optim=row["optim"], lr_mult=float(row["lr_mult"]), settings=" ".join(words), runs=tuple(runs))
