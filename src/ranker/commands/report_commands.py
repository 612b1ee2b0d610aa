"""``evenkeel report``, ``compare`` and ``plot``: pages, tables and pictures made from run folders."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from rich.console import Console

from ranker import atomic
from ranker.cli import command
from ranker.errors import UserError
from ranker.reports.comparison import as_csv, as_html, as_markdown, as_rich, caption, comparison, links, run_table
from ranker.reports.run_table import find_runs, load_runs, load_tracked, metric_names
from ranker.runs.run_folder import SUMMARY


@command
def report(arguments: Sequence[str] | None = None) -> int:
    """Writes one run as one self-contained HTML page.

    The page shows losses and metrics per task with divergences and rollbacks marked, sigma per tensor, early signs
    per layer, sharpness, and the table of the hold-out. It works for a run that is still going, was killed or
    diverged. A part that was not recorded says how to record it.
    """
    from ranker.reports.run_page import Recorded, render

    parser = argparse.ArgumentParser(description="Write one run as one self-contained HTML page.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/NAME")
    parser.add_argument("--out", type=Path, help="the page (default: RUN_DIR/report.html)")
    parser.add_argument("--wandb", action="store_true", help="add the page to the run in W&B, as an artifact")
    options = parser.parse_args(arguments)
    out: Path = options.out or options.run / "report.html"
    page = render(Recorded.read(options.run))
    atomic.write_text(out, page)
    print(out)
    if options.wandb:
        from ranker.training import trackers

        trackers.keep_later(options.run, trackers.Artifact("report", out))
    return 0


@command
def compare(arguments: Sequence[str] | None = None) -> int:
    """Prints one table per metric from run folders, the CSV of an earlier call, or a W&B project."""
    parser = argparse.ArgumentParser(
        description="Compare runs, such as: multirun/NAME --metric is_click/auc --format md"
    )
    parser.add_argument("runs", nargs="*", help="run folders, folders of sweeps, or CSV files written by --save")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="runs that were tracked online, after wandb login")
    parser.add_argument("--metric", nargs="+", help="such as click/auc watch_time/rmse (default: the first task's AUC)")
    parser.add_argument("--format", choices=["table", "md", "html", "csv"], default="table")
    parser.add_argument("--save", type=Path, help="write one row per run to this CSV file")
    options = parser.parse_args(arguments)
    if not options.runs and not options.wandb:
        parser.error("give run folders, CSV files or --wandb ENTITY/PROJECT")
    sources = [_load(source) for source in options.runs]
    if options.wandb:
        sources.append(load_tracked(options.wandb))
    runs = pl.concat(sources, how="diagonal_relaxed")
    if options.save:
        runs.write_csv(options.save)
    _print(runs, options.metric or _first_auc(runs), options.format)
    return 0


def _print(runs: pl.DataFrame, metrics: list[str], form: str) -> None:
    tables = [(caption(metric), *comparison(runs, metric)) for metric in metrics]
    if form == "html":
        every = [*tables, ("runs", *run_table(runs, metrics))]
        print(as_html(every, title="Comparison of runs", links=links(runs)), end="")
        return
    for metric, header, rows in tables:
        if form == "table":
            Console().print(as_rich(header, rows, title=metric))
            continue
        if len(tables) > 1:
            print(f"{metric}\n")
        print(as_markdown(header, rows) if form == "md" else as_csv(header, rows))


def _first_auc(runs: pl.DataFrame) -> list[str]:
    names = metric_names(runs)
    chosen = next((name for name in names if name.endswith("/auc")), None)
    if chosen is None:
        raise UserError(f"no run has an AUC; choose with --metric: {', '.join(names) or 'no run has any metric'}")
    return [chosen]


def _load(source: str) -> pl.DataFrame:
    if source.endswith(".csv"):
        if not Path(source).is_file():
            raise UserError(f"no file {source}")
        return pl.read_csv(source)
    return load_runs(source)


@command
def plot(arguments: Sequence[str] | None = None) -> int:
    """Draws loss and AUC of several runs, labelled by optimizer and learning rate."""
    from ranker.reports.curves import Curve, plot_training

    parser = argparse.ArgumentParser(description="Draw loss and AUC of several runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold some")
    parser.add_argument("--task", required=True, help="the binary task whose AUC is drawn")
    parser.add_argument("--out", type=Path, default=Path("training.png"), help=".png or .svg (default: %(default)s)")
    options = parser.parse_args(arguments)
    curves, titles = [], set()
    for folder in (run for given in options.runs for run in find_runs(given)):
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        interrupted = str(summary.get("reason")).startswith("interrupted")
        status = "interrupted" if interrupted else summary["status"]
        label = f"{summary['optim']} {summary['lr_mult']:g}x{'' if status == 'completed' else f', {status}'}"
        curves.append(Curve(label, summary["optim"], summary["lr_mult"], folder))
        titles.add(f"{summary['model']} on {summary['data']}, {summary['scale']} scale")
    plot_training(curves, options.task, options.out, title="; ".join(sorted(titles)))
    print(options.out)
    return 0
