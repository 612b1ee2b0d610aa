"""The page of many runs: one string that contains its charts, tables, style and script."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import polars as pl

from ranker.reports.comparison import PAGE, USELESS, caption, comparison, is_percent
from ranker.reports.run_table import CELL, setting_names
from ranker.reports.sweep_page.groups import Run, optimizers, panels, styles
from ranker.reports.sweep_page.learning import curve_names, learning, note
from ranker.reports.sweep_page.parallel import parallel
from ranker.reports.sweep_page.rates import against_rate
from ranker.reports.web.document import Cell, Section, document, facts, grid, missing, table

LONG = 9  # characters of a number that is rounded
MOST_ROWS = 2000  # runs in the table of runs; --save writes all of them
STATUSES = ("completed", "diverged", "unsettled", "failed", "interrupted")


def render(
    runs: pl.DataFrame,
    metrics: Sequence[str],
    *,
    title: str,
    folder: Path,
    advance: Callable[[int], object] = int,
) -> str:
    """Renders the comparison of runs. The page loads nothing from the network and has a bounded size.

    Args:
        runs: from ``load_runs``, or the CSV it was saved to, which has no curves.
        metrics: names such as ``click/auc``, in the order of the page.
        title: of the page.
        folder: where the page will lie; links to the pages of the runs start there.
        advance: called with the number of runs whose curves were read since the last call.

    Raises:
        UserError: no run has one of the metrics, or a metrics.csv is broken.
    """
    groups = panels(runs)
    every = [run for panel in groups for run in panel.runs]
    looks = styles(optimizers(runs))
    addresses = {run.name: _address(run, folder) for run in every}

    def link(run: Run) -> str:
        return addresses[run.name]

    rates = [against_rate(panel, metric, looks, link) for metric in metrics for panel in groups]
    curves = learning(groups, curve_names(metrics), looks, advance=advance)
    settings = [parallel(groups, metric, setting_names(runs), link) for metric in metrics]
    several = any(len(group.runs) > 1 for panel in groups for group in panel.groups)
    means = "".join(_means(runs, metric) for metric in metrics) if several else ""
    drawn = f'<p class="note">{note(several)}</p>{curves}' if curves else missing(_no_curves(every))
    return document(
        title,
        head=_head(title, every, looks),
        sections=[
            Section("rates", "Against the learning rate", _stack(rates)),
            Section("curves", "Learning curves", drawn),
            Section("settings", "Settings", _stack(settings)),
            Section("table", "Mean over seeds", means),
            Section("runs", "Runs", _runs(every, metrics, setting_names(runs), link)),
        ],
    )


def _head(title: str, runs: Sequence[Run], looks: dict[str, str]) -> str:
    counts = Counter(str(run.row["status"]) for run in runs)
    useless = sum(bool(run.useless) for run in runs)
    pairs = [("runs", f"{len(runs):,}"), *((name, f"{counts[name]:,}") for name in STATUSES if counts[name])]
    pairs += [(f"completed, {USELESS}", f"{useless:,}")] if useless else []
    for name in ("data", "scale", "model"):
        seen = sorted({str(run.row[name]) for run in runs})
        pairs.append((name, ", ".join(seen[:4]) + (f" and {len(seen) - 4} more" if len(seen) > 4 else "")))
    chips = "".join(
        f'<label><input type="checkbox" checked data-hides="{look.split()[-1]}"><i class="{look}"></i>'
        f"{escape(name)}</label>"
        for name, look in looks.items()
    )
    return f'<h1>{escape(title)}</h1>{facts(pairs)}<p class="chips">{chips}</p>'


def _stack(figures: Sequence[str]) -> str:
    return grid(figures) if any(figures) else ""


def _address(run: Run, folder: Path) -> str:
    """The page of a run, relative to the folder of this page, so that both can be moved together."""
    if run.folder is None or not (run.folder / PAGE).is_file():
        return ""
    return quote(Path(os.path.relpath(run.folder / PAGE, folder.resolve())).as_posix())


def _no_curves(runs: Sequence[Run]) -> str:
    if all(run.folder is None for run in runs):
        return "No curves: these runs come from a table. Give run folders to see them."
    return "No curves: no run folder has a metrics.csv (logger=csv writes it, also beside others)."


def _means(runs: pl.DataFrame, metric: str) -> str:
    header, rows = comparison(runs, metric)
    cells = ([_text(text) for text in row] for row in rows)
    return f"<h3>{escape(caption(metric))}</h3>{table(header, cells, sortable=True)}"


def _text(text: str) -> Cell:
    """A cell, sorted by its number also after remarks such as ``diverged 1 of 3;``. Long numbers are rounded."""
    word = text.rsplit("; ", 1)[-1].split(" ")[0].removesuffix("x")
    try:
        order = float(word)
    except ValueError:
        return Cell(escape(text).replace("; ", "<br>"))
    short = f"{order:.4g}" if word == text and len(text) > LONG else text
    return Cell(escape(short).replace("; ", "<br>"), order)


def _runs(runs: Sequence[Run], metrics: Sequence[str], settings: Sequence[str], link: Callable[[Run], str]) -> str:
    useless = any(run.useless for run in runs)
    keys = [name for name in CELL if name == "lr_mult" or len({run.row[name] for run in runs}) > 1]
    head = ["run", "status", *([USELESS] if useless else []), *keys, *settings, "seed"]
    head += [*map(caption, metrics), "diverged at step", "steps", "examples/s", "reason", "commit"]
    rows = []
    for run in runs[:MOST_ROWS]:
        name = escape(run.name)
        address = link(run)
        mark = f'<a href="{escape(address)}">{name}</a>' if address else name
        status = str(run.row["status"])
        row: list[str | Cell] = [
            f'<span class="name" data-run="{name}">{mark}</span>',
            f'<b class="status {escape(status)}">{escape(status)}</b>',
        ]
        row += [f'<b class="useless">{escape(", ".join(run.useless))}</b>' if run.useless else ""] if useless else []
        row += [_plain(run.row.get(key)) for key in (*keys, *settings, "seed")]
        row += [_metric(run, metric) for metric in metrics]
        row += [_plain(run.row.get(key)) for key in ("first_step", "steps")]
        row.append(_plain(run.row.get("examples_per_second"), digits=0))
        row += [f'<span class="why">{escape(str(run.row.get("reason") or ""))}</span>']
        row.append(escape(str(run.row.get("commit") or "")[:12]))
        rows.append(row)
    more = f'<p class="note">The first {MOST_ROWS:,} of {len(runs):,}; --save FILE.csv writes all of them.</p>'
    body = table(head, rows, sortable=True, search="show only runs with")
    return body + (more if len(runs) > MOST_ROWS else "")


def _metric(run: Run, metric: str) -> Cell:
    value = run.value(metric)
    if math.isnan(value):
        return Cell("undefined" if run.completed else "")
    return Cell(f"{100 * value:.2f}" if is_percent(metric) else f"{value:.4f}", value)


def _plain(value: object, *, digits: int | None = None) -> Cell:
    if value is None:
        return Cell("")
    if isinstance(value, bool | str):
        return _text(str(value))
    number = float(value)  # type: ignore[arg-type]
    return Cell(f"{number:,.{digits}f}" if digits is not None else f"{number:,.6g}", number)
