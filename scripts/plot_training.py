"""Draw loss and AUC of several runs: ``python scripts/plot_training.py RUN RUN --task is_click --out curves.png``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ranker.errors import UserError
from ranker.reports.curves import plot_training
from ranker.reports.run_table import find_runs
from ranker.runs.run_folder import SUMMARY


def main() -> None:
    """Finds the runs, labels them by optimizer and learning rate, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold some")
    parser.add_argument("--task", required=True, help="the binary task whose AUC is drawn")
    parser.add_argument("--out", type=Path, default=Path("training.png"), help=".png or .svg")
    options = parser.parse_args()
    curves, titles = [], set()
    for folder in (run for given in options.runs for run in find_runs(given)):
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        ending = f", {summary['status']}" if summary["status"] != "completed" else ""
        curves.append((f"{summary['optim']} {summary['lr_mult']:g}x{ending}", summary["optim"], folder))
        titles.add(f"{summary['model']} on {summary['data']}, {summary['scale']} scale")
    plot_training(curves, options.task, options.out, title="; ".join(sorted(titles)))
    print(options.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
