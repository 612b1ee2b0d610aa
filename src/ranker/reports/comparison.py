"""Comparison tables of optimizers, as Markdown, CSV, terminal table or an HTML page with sortable columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table

from ranker.reports.run_table import CELL, KEYS, LOST, MADE_WITH, by_cell, setting_names, useless_tasks

ORDER = {
    "model": ("small", "large", "large_dcn", "moe", "ple"),
    "optim": ("adagrad", "gc", "agc", "lamb", "clippy"),
}
PERCENT = ("auc", "gauc")
USELESS = "no better than a constant"
PAGE = "report.html"

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; display: block; max-width: 100%; overflow-x: auto; }
td { max-width: 18rem; overflow-wrap: anywhere; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; font-variant-numeric: tabular-nums; }
th { cursor: pointer; border-bottom: 2px solid #888; white-space: nowrap; }
th[aria-sort=ascending]::after { content: " \\25b2"; } th[aria-sort=descending]::after { content: " \\25bc"; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; } th, td { border-color: #444; } }
"""

# A cell is sorted by the number at its start. Cells that start with text come after all numbers.
SCRIPT = """
const key = cell => {
  const text = cell.textContent.trim(), number = parseFloat(text);
  return Number.isNaN(number) ? [1, text] : [0, number];
};
const compare = (a, b) => a[0] - b[0] || (a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : 0);
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].sort((a, b) => compare(key(a.cells[column]), key(b.cells[column])));
  body.append(...(down ? rows.reverse() : rows));
};
"""


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
    optims = _ordered(cells["optim"].unique().to_list(), ORDER["optim"])
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


def run_table(runs: pl.DataFrame, metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows with one row per run: settings, status, reason, metrics, commit and machine."""
    useless = [", ".join(tasks) for tasks in useless_tasks(runs)]
    runs = runs.with_columns(pl.Series(USELESS, useless, dtype=pl.String))
    seen = ["status", *([USELESS] if any(useless) else []), "first_step"]
    columns = [*KEYS, "mitigation", *setting_names(runs), *seen, *metrics, "steps", "run", *MADE_WITH]
    columns = [column for column in columns if column in runs.columns]  # an old CSV has fewer
    rows = [[_plain(value, name) for name, value in row.items()] for row in runs.select(columns).iter_rows(named=True)]
    return columns, rows


def links(runs: pl.DataFrame) -> dict[str, str]:
    """Addresses of the pages of runs that have one (``report.html``), by the name of the run."""
    if "folder" not in runs.columns:
        return {}
    pages = {row["run"]: Path(row["folder"]) / PAGE for row in runs.iter_rows(named=True) if row["folder"]}
    return {name: page.as_uri() for name, page in pages.items() if page.is_file()}


def caption(metric: str) -> str:
    """The name of a metric with its unit: an AUC is in percent in every table."""
    return f"{metric}, %" if _is_percent(metric) else metric


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


def as_html(
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    *,
    title: str,
    links: Mapping[str, str] | None = None,
) -> str:
    """An HTML page of sortable tables that loads nothing from the network.

    Args:
        tables: caption, header and rows of each.
        title: of the page.
        links: addresses, by the text of a cell.
    """
    parts = "\n".join(_html_table(*table, links=links or {}) for table in tables)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{escape(title)}</h1>\n{parts}\n<script>{SCRIPT}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _cell(cell: dict[str, Any], metric: str) -> str:
    scale, digits = (100.0, 2) if _is_percent(metric) else (1.0, 4)
    mean, std = cell[f"{metric}/mean"], cell[f"{metric}/std"]
    value = ""
    if mean is not None and not math.isnan(mean):
        value = f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if std is not None else "")
        value += f" (n={cell['completed']})"
    counts = {kind: cell[kind] for kind in LOST} | {USELESS: cell[f"{metric}/useless"]}
    notes = [f"{kind} {count} of {cell['runs']}" for kind, count in counts.items() if count]
    return "; ".join([*notes, *([value] if value else [])])


def _is_percent(metric: str) -> bool:
    return metric.rsplit("/", 1)[-1].split(".", 1)[0] in PERCENT  # gauc.user is a gauc


def _plain(value: Any, name: str = "") -> str:
    if value is None:
        return ""
    if isinstance(value, float) and _is_percent(name):
        return f"{100 * value:.2f}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _ordered(names: Sequence[str], order: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda n: (order.index(n) if n in order else len(order), n))


def _html_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, links: Mapping[str, str]) -> str:
    def inner(cell: str) -> str:
        return f'<a href="{escape(links[cell])}">{escape(cell)}</a>' if cell in links else escape(cell)

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ["<tr>" + "".join(f"<td>{inner(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    body = "\n".join(lines)
    return f"<h2>{escape(caption)}</h2>\n<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
