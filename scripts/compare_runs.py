"""Compare runs: ``python scripts/compare_runs.py multirun/NAME --metric is_click/auc --format md``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import polars as pl
from rich.console import Console

from ranker.errors import UserError
from ranker.reports.comparison import as_csv, as_html, as_markdown, as_rich, comparison, run_table
from ranker.reports.run_table import load_runs, load_tracked, metric_names


def main() -> None:
    """Reads run folders, the CSV of an earlier call or a W&B project, and prints one table a metric."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help="run folders, folders of sweeps, or CSV files written by --save")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="runs that were tracked online, after wandb login")
    parser.add_argument("--metric", nargs="+", help="such as click/auc watch_time/rmse; the first task's AUC otherwise")
    parser.add_argument("--format", choices=["table", "md", "html", "csv"], default="table")
    parser.add_argument("--save", type=Path, help="write one row a run to this CSV file")
    options = parser.parse_args()
    if not options.runs and not options.wandb:
        parser.error("give run folders, CSV files or --wandb ENTITY/PROJECT")
    sources = [_load(source) for source in options.runs]
    if options.wandb:
        sources.append(load_tracked(options.wandb))
    runs = pl.concat(sources, how="diagonal_relaxed")
    if options.save:
        runs.write_csv(options.save)
    _print(runs, options.metric or _first_auc(runs), options.format)


def _print(runs: pl.DataFrame, metrics: list[str], form: str) -> None:
    tables = [(metric, *comparison(runs, metric)) for metric in metrics]
    if form == "html":
        print(as_html([*tables, ("runs", *run_table(runs, metrics))], title="Comparison of runs"), end="")
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


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
