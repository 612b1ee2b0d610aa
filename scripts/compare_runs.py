"""Compare runs: ``python scripts/compare_runs.py multirun/NAME --metric is_click/auc --format md``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import polars as pl
from rich.console import Console

from ranker.errors import UserError
from ranker.reports.comparison import as_csv, as_markdown, as_rich, comparison
from ranker.reports.runs import load_runs


def main() -> None:
    """Reads run folders (or the CSV of an earlier call) and prints one table a metric."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, folders of sweeps, or CSV files written by --save")
    parser.add_argument("--metric", nargs="+", default=["is_click/auc"], help="such as is_click/auc watch_time/rmse")
    parser.add_argument("--format", choices=["table", "md", "csv"], default="table")
    parser.add_argument("--save", type=Path, help="write one row a run to this CSV file")
    options = parser.parse_args()
    runs = pl.concat([_load(source) for source in options.runs], how="diagonal_relaxed")
    if options.save:
        runs.write_csv(options.save)
    for metric in options.metric:
        header, rows = comparison(runs, metric)
        if options.format == "table":
            Console().print(as_rich(header, rows, title=metric))
        else:
            print(f"{metric}\n" if len(options.metric) > 1 else "", end="\n" if len(options.metric) > 1 else "")
            print(as_markdown(header, rows) if options.format == "md" else as_csv(header, rows))


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
