"""Comparison tables of optimizers, as Markdown, CSV or terminal table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import polars as pl
from rich.table import Table

from ranker.reports.run_table import CELL, LOST, by_cell, setting_names

ORDER = {
    "model": ("small", "large", "large_dcn", "moe", "ple"),
    "optim": ("adagrad", "gc", "agc", "lamb", "clippy"),
}
PERCENT = ("auc", "gauc")
USELESS = "no better than a constant"
PAGE = "report.html"


def comparison(runs: pl.DataFrame, metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows for one metric: one column per optimizer; a row per model, mitigation, learning rate and setting.

    A setting is a column where it differs between runs that would otherwise be averaged as if they were seeds.

    A cell contains mean ± standard deviation over the n completed seeds (AUC in percent, as in the paper). If a seed
    diverged, ended unsettled, failed or was interrupted, ``diverged k of n`` comes first. If a completed one is no
    better than a constant prediction at the metric's task, ``no better than a constant k of n`` does.

    Args:
        runs: from ``load_runs``.
        metric: a name such as ``is_click/auc``.
    """
    cells = by_cell(runs, [metric])
    optims = ordered(cells["optim"].unique().to_list(), ORDER["optim"])
    settings = setting_names(runs)
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    unnamed = len(cells.unique([*CELL, *settings])) < len(cells)  # configurations that differ in nothing that is known
    settings += ["cell"] if unnamed else []
    for cell in cells.iter_rows(named=True):
        base = (cell["data"], cell["scale"], cell["model"], cell["mitigation"], cell["lr_mult"])
        key = (*base, *("" if cell[name] is None else str(cell[name]) for name in settings))
        found.setdefault(key, {})[cell["optim"]] = _cell(cell, metric)
    rank = {name: i for i, name in enumerate(ORDER["model"])}
    # Runs without a mitigation come first, as the baseline.
    keys = sorted(found, key=lambda k: (k[0], k[1], rank.get(k[2], len(rank)), k[2], k[3] != "none", *k[3:]))
    several, mitigated = len({key[:2] for key in keys}) > 1, any(key[3] != "none" for key in keys)
    header = [
        *(["data", "scale"] if several else []),
        "model",
        *(["mitigation"] if mitigated else []),
        "lr",
        *settings,
        *optims,
    ]
    rows = []
    for key in keys:
        names = [*(key[:2] if several else ()), key[2], *(key[3:4] if mitigated else ()), f"{key[4]:g}x", *key[5:]]
        rows.append([*names, *(found[key].get(optim, "") for optim in optims)])
    return header, rows


def caption(metric: str) -> str:
    """The name of a metric with its unit: an AUC is in percent in every table."""
    return f"{metric}, %" if is_percent(metric) else metric


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def as_csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Comma-separated values. Cells must contain no commas or quotes."""
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
    scale, digits = (100.0, 2) if is_percent(metric) else (1.0, 4)
    mean, std = cell[f"{metric}/mean"], cell[f"{metric}/std"]
    value = ""
    if mean is not None and not math.isnan(mean):
        value = f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if std is not None else "")
        value += f" (n={cell['completed']})"
    counts = {kind: cell[kind] for kind in LOST} | {USELESS: cell[f"{metric}/useless"]}
    notes = [f"{kind} {count} of {cell['runs']}" for kind, count in counts.items() if count]
    return "; ".join([*notes, *([value] if value else [])])


def is_percent(metric: str) -> bool:
    """Whether a metric is shown in percent."""
    return metric.rsplit("/", 1)[-1].split(".", 1)[0] in PERCENT  # gauc.user is a gauc


def ordered(names: Sequence[str], order: Sequence[str]) -> list[str]:
    """The names, those of an order first and the others by the alphabet."""
    return sorted(names, key=lambda n: (order.index(n) if n in order else len(order), n))
