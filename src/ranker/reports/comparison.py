"""The comparison of optimizers as a table: a row a model, mitigation and learning rate, a column an optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import polars as pl
from rich.table import Table

from ranker.reports.runs import KEYS, MADE_WITH, by_cell

ORDER = {
    "model": ("small", "large", "large_dcn", "moe", "ple"),
    "optim": ("adagrad", "gc", "agc", "lamb", "clippy"),
}
PERCENT = ("auc",)


def comparison(runs: pl.DataFrame, metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table for one metric.

    A cell holds mean ± standard deviation over the seeds that completed (AUC in percent, as in the paper);
    ``diverged k of n`` where any seed was lost, with the mean of the rest after it.

    Args:
        runs: from ``load_runs``.
        metric: a name such as ``is_click/auc``.
    """
    cells = by_cell(runs, [metric])
    optims = _ordered(cells["optim"].unique().to_list(), ORDER["optim"])
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for cell in cells.iter_rows(named=True):
        key = (cell["data"], cell["scale"], cell["model"], cell["mitigation"], cell["lr_mult"])
        found.setdefault(key, {})[cell["optim"]] = _cell(cell, metric)
    rank = {name: i for i, name in enumerate(ORDER["model"])}
    # Runs without a mitigation come first: they are what the others are compared with.
    keys = sorted(found, key=lambda k: (k[0], k[1], rank.get(k[2], len(rank)), k[2], k[3] != "none", *k[3:]))
    several, mitigated = len({key[:2] for key in keys}) > 1, any(key[3] != "none" for key in keys)
    header = [*(["data", "scale"] if several else []), "model", *(["mitigation"] if mitigated else []), "lr", *optims]
    rows = []
    for key in keys:
        names = [*(key[:2] if several else ()), key[2], *(key[3:4] if mitigated else ()), f"{key[4]:g}x"]
        rows.append([*names, *(found[key].get(optim, "") for optim in optims)])
    return header, rows


def run_table(runs: pl.DataFrame, metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows with one row a run: what it was, how it ended and why, where its numbers come from."""
    columns = [*KEYS, "mitigation", "status", "first_step", *metrics, "steps", "run", *MADE_WITH]
    columns = [column for column in columns if column in runs.columns]  # a CSV of before lacks some
    return columns, [[_plain(value) for value in row] for row in runs.select(columns).iter_rows()]


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def as_csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Comma-separated values; no cell holds a comma or a quote."""
    return "\n".join(",".join(row) for row in [header, *rows]) + "\n"


def as_rich(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str) -> Table:
    """A table for the terminal."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table


def _cell(cell: dict[str, Any], metric: str) -> str:
    scale, digits = (100.0, 2) if metric.rsplit("/", 1)[-1] in PERCENT else (1.0, 4)
    mean, std = cell[f"{metric}/mean"], cell[f"{metric}/std"]
    value = ""
    if mean is not None and not math.isnan(mean):
        value = f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if std is not None else "")
    notes = [f"{kind} {cell[kind]} of {cell['runs']}" for kind in ("diverged", "failed") if cell[kind]]
    return "; ".join([*notes, *([value] if value else [])])


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _ordered(names: Sequence[str], order: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda n: (order.index(n) if n in order else len(order), n))
