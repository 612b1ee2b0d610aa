"""Curves from the metrics.csv of run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ranker.errors import UserError
from ranker.paper.jobs import Job
from ranker.paper.store import find, row_of
from ranker.runs.run_folder import METRICS

RUN = ("model", "optim", "lr_mult", "seed", "status", "first_step", "micro", "train.warmup_steps", "commit", "machine")
DIGITS = 5


def curves(
    folder: Path, jobs: Sequence[Job], columns: Mapping[str, str], *, every: int = 1
) -> tuple[pl.DataFrame, list[Job]]:
    """One row a run and step.

    Args:
        folder: a sweep's folder.
        jobs: the runs.
        columns: name in metrics.csv by the name it gets; one that a run has not is left null.
        every: keep every so many steps, and the steps at which the hold-out was evaluated.

    Returns:
        ``RUN``, step and the columns; and the jobs without a run.
    """
    found, missing = find(folder, jobs)
    parts = [_curve(path, row_of(job, path, summary), columns, every) for job, (path, summary) in found]
    return (pl.concat(parts, how="diagonal_relaxed") if parts else pl.DataFrame()), missing


def rounded(frame: pl.DataFrame) -> pl.DataFrame:
    """Floats to some significant digits, so that a CSV of curves stays small."""
    floats = [name for name, kind in frame.schema.items() if kind.is_float()]
    return frame.with_columns(pl.col(floats).round_sig_figs(DIGITS))


def _curve(folder: Path, row: Mapping[str, Any], columns: Mapping[str, str], every: int) -> pl.DataFrame:
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"no {METRICS} in {folder}: a figure needs runs with logger=csv")
    metrics = pl.read_csv(path, infer_schema_length=None)
    wanted = [
        (pl.col(source) if source in metrics.columns else pl.lit(None)).cast(pl.Float64).alias(name)
        for name, source in columns.items()
    ]
    merged = metrics.select("step", *wanted).group_by("step", maintain_order=True).agg(pl.all().drop_nulls().last())
    kept = merged.filter((pl.col("step") % every == 0) | pl.any_horizontal(pl.col("^auc.*$").is_not_null()))
    named = [pl.lit(row.get(key)).alias(key) for key in RUN]
    return rounded(kept.select(*named, "step", *columns).sort("step"))
