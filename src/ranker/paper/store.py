"""From run folders to the small CSV files in results/, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ranker.errors import UserError
from ranker.paper.jobs import Job
from ranker.runs.run_folder import SUMMARY

# Where a run lay, how it was watched and how it was scheduled decides none of its numbers.
UNRECORDED = (
    "data.source",
    "data.cache_dir",
    "data.root",
    "logger",
    "train.threads",
    "train.checkpoint_every",
    "train.log_every",
    "callbacks.early_signs.every",
    "callbacks.early_signs.task_gradients",
)
DEFAULTS = {"scale": "laptop", "lr_mult": "1", "seed": "0"}  # what holds where nothing is said
# Overrides of runs made before a key got its present name.
RENAMED = {
    "model.net.hidden=${scale.model.small.hidden}": "model.net.hidden='${model.widths.small.${scale.name}}'",
}
STANDARD = ("data", "scale", "model", "optim", "lr_mult", "seed")
METRICS = ("auc", "ne", "rmse", "calibration")


def identity(overrides: Iterable[str]) -> frozenset[tuple[str, str]]:
    """What makes two jobs the same: their overrides, in whatever order and however a number was written."""
    said = DEFAULTS | dict(RENAMED.get(override, override).split("=", 1) for override in overrides)
    return frozenset((key, _plain(value)) for key, value in said.items() if key not in UNRECORDED)


def collect(folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:
    """The runs of some jobs in a sweep's folder, one row each in the order of the jobs, and the jobs without a run.

    Columns: the standard keys, every other override by its name, lr, status, steps, examples_per_second, seconds,
    first_step, micro, dense_parameters, run, config_hash, commit, machine, and the hold-out's ``<task>/<metric>``. Runs
    that no job asks for and runs that failed are left out; of two runs of one job the last in name order counts.
    """
    found, missing = find(folder, jobs)
    rows = [row_of(job, *run) for job, run in found]
    return pl.DataFrame(rows, infer_schema_length=None), missing


def find(folder: Path, jobs: Sequence[Job]) -> tuple[list[tuple[Job, tuple[Path, dict[str, Any]]]], list[Job]]:
    """Run folder and summary of each job, and the jobs without a run."""
    known = {}
    for path in sorted(Path(folder).rglob(SUMMARY)):
        summary = json.loads(path.read_text(encoding="utf-8"))
        overrides = path.parent / ".hydra" / "overrides.yaml"
        if summary["status"] != "failed" and overrides.is_file():
            known[identity(yaml.safe_load(overrides.read_text(encoding="utf-8")))] = (path.parent, summary)
    found = [(job, known[identity(job)]) for job in jobs if identity(job) in known]
    return found, [job for job in jobs if identity(job) not in known]


def matching(runs: pl.DataFrame, overrides: Iterable[str], among: Iterable[str]) -> pl.DataFrame:
    """The runs that were made with some overrides and without the other keys.

    Args:
        runs: from ``collect`` or its CSV.
        overrides: such as ``("model=large", "data.window=1024")``.
        among: every key that may have been overridden; one that is not in ``overrides`` must be null.
    """
    wanted = {key: _number(value) for key, value in (override.split("=", 1) for override in overrides)}
    for key in among:
        column = pl.col(key)
        if key not in runs.columns:
            runs = runs if key not in wanted else runs.clear()
        elif key not in wanted:
            runs = runs.filter(column.is_null())
        elif isinstance(wanted[key], float):
            runs = runs.filter(column.cast(pl.Float64) == wanted[key])
        else:
            runs = runs.filter(column.cast(pl.String) == str(wanted[key]))
    return runs


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that one who is stopped in the middle leaves the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_runs(path: Path) -> pl.DataFrame:
    """A CSV of runs.

    Raises:
        UserError: it is not there.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; make it with scripts/reproduce.py")
    return pl.read_csv(path, infer_schema_length=None)


def row_of(job: Job, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The row of one run."""
    overrides = dict(override.split("=", 1) for override in job)
    row: dict[str, Any] = {key: summary[key] for key in STANDARD}
    for key, value in overrides.items():
        if key not in row and key not in UNRECORDED:
            row[key] = _number(value)
    row |= {key: summary[key] for key in ("lr", "status", "steps", "examples_per_second", "seconds")}
    row |= {"first_step": summary["divergence"]["first_step"], "micro": summary["divergence"]["micro"]}
    row |= {"dense_parameters": summary["parameters"]["dense"], "run": folder.name}
    row |= {key: summary.get(key) for key in ("config_hash", "commit", "machine")}
    for key, value in summary["metrics"].items():
        if key.rsplit("/", 1)[-1] in METRICS:
            row[key.removeprefix("test/")] = None if value is None else float(f"{value:.6g}")
    return row


def _plain(value: str) -> str:
    number = _number(value)
    return f"{number:g}" if isinstance(number, float) else value.strip().lower()


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
