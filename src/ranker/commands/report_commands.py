"""``evenkeel report``, ``compare`` and ``plot``: pages, tables and pictures made from run folders."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ranker import atomic
from ranker.cli import command
from ranker.errors import UserError
from ranker.reports.comparison import PAGE, as_csv, as_markdown, as_rich, caption, comparison
from ranker.reports.run_table import find_runs, load_runs, load_tracked, metric_names
from ranker.runs.run_folder import METRICS, SUMMARY


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
    """Prints one table per metric from run folders, the CSV of an earlier call, or a W&B project, or writes a page."""
    parser = argparse.ArgumentParser(
        description="Compare runs, such as: multirun/NAME --metric is_click/auc --format md"
    )
    parser.add_argument("runs", nargs="*", help="run folders, folders of sweeps, or CSV files written by --save")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="runs that were tracked online, after wandb login")
    parser.add_argument("--metric", nargs="+", help="such as click/auc watch_time/rmse (default: the first task's AUC)")
    parser.add_argument("--format", choices=["table", "md", "csv"], default="table")
    parser.add_argument("--html", action="store_true", help="write one page: curves, AUC against the rate, every run")
    parser.add_argument("--out", type=Path, help="the page (default: comparison.html in the folder that is given)")
    parser.add_argument(
        "--no-run-pages", action="store_true", help="with --html: do not write the report.html of runs that lack it"
    )
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
    metrics = options.metric or _first_auc(runs)
    if not options.html:
        _print(runs, metrics, options.format)
        return 0
    folders = [Path(source) for source in options.runs if Path(source).is_dir()]
    out: Path = options.out or (folders[0] if len(folders) == 1 else Path()) / "comparison.html"
    if not options.no_run_pages:
        _write_pages(runs)
    _write_comparison(runs, metrics, out, title=f"Comparison of {', '.join(map(_name, folders[:3])) or 'runs'}")
    print(out)
    return 0


def _name(folder: Path) -> str:
    return folder.resolve().name


def _write_comparison(runs: pl.DataFrame, metrics: list[str], out: Path, *, title: str) -> None:
    from ranker.reports.sweep_page import render

    with _progress() as bar:
        task = bar.add_task("reading curves", total=len(runs))
        page = render(runs, metrics, title=title, folder=out.parent, advance=lambda count: bar.advance(task, count))
    atomic.write_text(out, page)


def _write_pages(runs: pl.DataFrame) -> None:
    """The page of each run that has none, or one that is older than what it shows."""
    from ranker.reports.run_page import Recorded, render

    folders = [Path(folder) for folder in runs["folder"].drop_nulls()] if "folder" in runs.columns else []
    stale = [folder for folder in folders if _is_stale(folder)]
    with _progress() as bar:
        for folder in bar.track(stale, description="pages of runs") if stale else ():
            try:
                atomic.write_text(folder / PAGE, render(Recorded.read(folder)))
            except OSError as error:  # somebody else's runs: the comparison does without links to them
                print(f"no page of {folder.name}: {error.strerror}", file=sys.stderr)


def _is_stale(folder: Path) -> bool:
    page, seen = folder / PAGE, [folder / SUMMARY, folder / METRICS]
    newest = max((path.stat().st_mtime_ns for path in seen if path.is_file()), default=0)
    return folder.is_dir() and (not page.is_file() or page.stat().st_mtime_ns < newest)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _print(runs: pl.DataFrame, metrics: list[str], form: str) -> None:
    tables = [(caption(metric), *comparison(runs, metric)) for metric in metrics]
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
