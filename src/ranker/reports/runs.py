"""Run folders read back as one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ranker.errors import UserError, suggest
from ranker.runs.run_folder import SUMMARY

KEYS = ("data", "scale", "model", "optim", "lr_mult", "seed")
CELL = ("data", "scale", "model", "optim", "mitigation", "lr_mult")  # what runs that differ by seed alone share
MADE_WITH = ("reason", "config_hash", "commit", "machine")


def find_runs(folder: str | Path) -> list[Path]:
    """Run folders at or below a folder, in name order.

    Raises:
        UserError: there is none.
    """
    folders = sorted(path.parent for path in Path(folder).rglob(SUMMARY))
    if not folders:
        raise UserError(f"no {SUMMARY} at or below {folder}; give a run folder, or the folder of a sweep")
    return folders


def load_runs(folder: str | Path) -> pl.DataFrame:
    """One row a run: what was asked for, how it ended, and every metric of the hold-out.

    Columns: data, scale, model, optim, mitigation, lr_mult, seed, lr, status, first_step, micro, steps,
    examples_per_second, data_wait_fraction, dense_parameters, reason, config_hash, commit, machine (null in runs
    made before they were recorded), run, and ``<task>/<metric>``.

    Raises:
        UserError: there is no run.
    """
    rows = []
    for path in find_runs(folder):
        rows.append(run_row(json.loads((path / SUMMARY).read_text(encoding="utf-8")), path.name))
    return pl.DataFrame(rows, infer_schema_length=None)


def run_row(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One run's row of the table that ``load_runs`` describes.

    Args:
        summary: as in summary.json.
        name: the run's name.
    """
    row = {key: summary[key] for key in (*KEYS, "lr", "status", "steps", "examples_per_second", "data_wait_fraction")}
    row |= {"first_step": summary["divergence"]["first_step"], "micro": summary["divergence"]["micro"]}
    row |= {"dense_parameters": summary["parameters"]["dense"], "run": name}
    row |= {"mitigation": summary.get("mitigation", "none")} | {key: summary.get(key) for key in MADE_WITH}
    return row | {key.removeprefix("test/"): value for key, value in summary["metrics"].items()}


def metric_names(runs: pl.DataFrame) -> list[str]:
    """Names of the metrics, such as ``click/auc``, in the order of the table."""
    return [column for column in runs.columns if "/" in column]


def by_cell(runs: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """Mean and standard deviation over seeds of each (data, scale, model, optim, mitigation, lr_mult).

    Args:
        runs: from ``load_runs`` (or the CSV it was saved to; one without the column had no mitigation).
        metrics: names such as ``is_click/auc``.

    Returns:
        One row a cell: its keys, ``runs``, ``diverged`` and ``failed`` (numbers of runs), and for each metric
        ``<metric>/mean`` and ``<metric>/std`` (sample standard deviation) over the runs that completed.

    Raises:
        UserError: a metric is in none of the runs.
    """
    for metric in metrics:
        if metric not in runs.columns:
            raise UserError(f"no run has the metric '{metric}'; {suggest(metric, metric_names(runs))}")
    done = pl.col("status") == "completed"
    cells = [pl.len().alias("runs")]
    cells += [(pl.col("status") == status).sum().alias(status) for status in ("diverged", "failed")]
    for metric in metrics:
        cells.append(pl.col(metric).filter(done).mean().alias(f"{metric}/mean"))
        cells.append(pl.col(metric).filter(done).std().alias(f"{metric}/std"))
    if "mitigation" not in runs.columns:
        runs = runs.with_columns(mitigation=pl.lit("none"))
    return runs.with_columns(pl.col("mitigation").fill_null("none")).group_by(CELL, maintain_order=True).agg(cells)
