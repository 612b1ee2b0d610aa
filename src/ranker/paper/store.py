"""Reads the run folders of a sweep into tables: one row per run, or one row per run and step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ranker.errors import UserError
from ranker.paper.jobs import Job
from ranker.reports.run_table import outcome
from ranker.runs.config_identity import NOT_IDENTIFYING, is_below
from ranker.runs.metric_names import TEST
from ranker.runs.run_folder import CONFIG, EVENTS, SUMMARY, whole_lines
from ranker.runs.run_folder import METRICS as METRICS_FILE

# Settings that do not identify a published run. Where the data lie does not matter, because the data set has a name.
UNRECORDED = (*NOT_IDENTIFYING, "data.source", "data.root")
DEFAULTS = {"scale": "laptop", "lr_mult": "1", "seed": "0"}  # values of keys that a job does not override
# Overrides of runs that were made before a setting got its present name.
RENAMED = {
    "model.net.hidden=${scale.model.small.hidden}": "model.net.hidden='${model.widths.small.${scale.name}}'",
}
STANDARD = ("data", "scale", "model", "optim", "lr_mult", "seed")
METRICS = ("auc", "ne", "rmse", "calibration")
CURVE_KEYS = (*STANDARD[2:], "method", "status", "first_step", "full_step", "micro", "commit", "machine")
DIGITS = 5  # significant digits in the CSV files of curves


def identity(overrides: Iterable[str]) -> frozenset[tuple[str, str]]:
    """What identifies a job: its overrides, independent of their order and of how numbers are written."""
    values = DEFAULTS | dict(RENAMED.get(override, override).split("=", 1) for override in overrides)
    return frozenset((key, _normalised(value)) for key, value in values.items() if not is_below(key, UNRECORDED))


def collect(folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:
    """The runs of some jobs in a sweep folder, one row per run in the order of the jobs, and the jobs without a run.

    Columns: the standard keys, every other override by its name, lr, status, steps, examples_per_second, seconds,
    first_step, micro, full_step (first step of the divergence that ended the run), unsettled_step, batch_size, base_lr,
    dense_parameters, run, config_hash, commit, machine, and ``<task>/<metric>`` on the hold-out. A job with the
    override ``tags=[NAME]`` has NAME in the column method.
    Failed runs and runs of other jobs are ignored. If a job has several runs, the one that ended last is used.
    """
    found, missing = find(folder, jobs)
    rows = [row_of(job, *run) for job, run in found]
    return pl.DataFrame(rows, infer_schema_length=None), missing


def curves(
    folder: Path, jobs: Sequence[Job], columns: Mapping[str, str], *, every: int = 1
) -> tuple[pl.DataFrame, list[Job]]:
    """Training curves from metrics.csv, one row per run and step.

    Args:
        folder: a sweep folder.
        jobs: the runs.
        columns: metric name by new column name. A metric that a run does not have becomes null.
        every: keep only every n-th step, and all steps with an evaluation on the hold-out.

    Returns:
        ``CURVE_KEYS``, step and the columns; and the jobs without a run.

    Raises:
        UserError: a run has no metrics.csv.
    """
    found, missing = find(folder, jobs)
    parts = [_curve(path, row_of(job, path, summary), columns, every) for job, (path, summary) in found]
    return (pl.concat(parts, how="diagonal_relaxed") if parts else pl.DataFrame()), missing


def find(folder: Path, jobs: Sequence[Job]) -> tuple[list[tuple[Job, tuple[Path, dict[str, Any]]]], list[Job]]:
    """Run folder and summary of each job, and the jobs without a run."""
    known = {}
    for path in sorted(Path(folder).rglob(SUMMARY), key=lambda path: (path.stat().st_mtime_ns, path)):
        summary = json.loads(path.read_text(encoding="utf-8"))
        overrides = path.parent / ".hydra" / "overrides.yaml"
        if summary["status"] != "failed" and overrides.is_file():
            known[identity(yaml.safe_load(overrides.read_text(encoding="utf-8")))] = (path.parent, summary)
    found = [(job, known[identity(job)]) for job in jobs if identity(job) in known]
    return found, [job for job in jobs if identity(job) not in known]


def unique(jobs: Iterable[Job]) -> list[Job]:
    """The jobs without those that ask for the same run as an earlier one."""
    found: dict[frozenset[tuple[str, str]], Job] = {}
    for job in jobs:
        found.setdefault(identity(job), job)
    return list(found.values())


def matching(runs: pl.DataFrame, overrides: Iterable[str], among: Iterable[str]) -> pl.DataFrame:
    """The runs that have exactly these overrides among some keys.

    Args:
        runs: from ``collect`` or its CSV.
        overrides: such as ``("model=large", "data.window=1024")``.
        among: keys to compare. A key that is not in ``overrides`` must be null.
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


def read_runs(path: Path) -> pl.DataFrame:
    """Reads a CSV of runs. Overrides with a former name (``RENAMED``) get the present one; the file keeps what was run.

    Raises:
        UserError: the file does not exist.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; make it with scripts/reproduce.py")
    runs = pl.read_csv(path, infer_schema_length=None, raise_if_empty=False)  # a phase may have no runs
    for former, present in RENAMED.items():
        (key, value), renamed = former.split("=", 1), present.split("=", 1)[1]
        if key in runs.columns:
            runs = runs.with_columns(pl.col(key).cast(pl.String).replace(value, renamed))
    return runs


def row_of(job: Job, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The row of one run; see ``collect`` for the columns."""
    row: dict[str, Any] = {key: summary[key] for key in STANDARD}
    tags = [override.removeprefix("tags=[").removesuffix("]") for override in job if override.startswith("tags=[")]
    if tags:
        row["method"] = tags[0]
    for key, value in (override.split("=", 1) for override in job):
        if key not in row and not is_below(key, UNRECORDED):
            row[key] = _number(value)
    row |= {"lr": summary["lr"], "status": outcome(summary)}
    row |= {key: summary[key] for key in ("steps", "examples_per_second", "seconds")}
    row |= {"first_step": summary["divergence"]["first_step"], "micro": summary["divergence"]["micro"]}
    row |= {f"{kind}_step": first_event(folder, kind) for kind in ("full", "unsettled")}
    row |= {**{key: summary.get(key) for key in ("batch_size", "base_lr")}}
    row |= {"dense_parameters": summary["parameters"]["dense"], "run": folder.name}
    row |= {key: summary.get(key) for key in ("config_hash", "commit", "machine")}
    for key, value in summary["metrics"].items():
        if key.rsplit("/", 1)[-1] in METRICS:
            row[key.removeprefix(f"{TEST}/")] = None if value is None else float(f"{value:.6g}")
    return row


def first_event(folder: Path, kind: str) -> int | None:
    """The first step of the first event of a kind; None if a run had none.

    ``first_step`` of the summary is that of the earliest event, such as a micro divergence long before the full one.
    """
    path = folder / EVENTS
    events = [json.loads(line) for line in whole_lines(path).splitlines()] if path.is_file() else []
    return next((int(event["step"]) for event in events if event.get("kind") == kind), None)


def warmup_of(folder: Path) -> int:
    """Steps of warm-up of a run."""
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    return int(config["train"]["warmup_steps"] or 0)


def _curve(folder: Path, row: Mapping[str, Any], columns: Mapping[str, str], every: int) -> pl.DataFrame:
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(f"no {METRICS_FILE} in {folder}: a figure needs runs with logger=csv")
    metrics = pl.read_csv(whole_lines(path), infer_schema_length=None)
    wanted = [
        (pl.col(source) if source in metrics.columns else pl.lit(None)).cast(pl.Float64).alias(name)
        for name, source in columns.items()
    ]
    merged = metrics.select("step", *wanted).group_by("step", maintain_order=True).agg(pl.all().drop_nulls().last())
    kept = merged.filter((pl.col("step") % every == 0) | pl.any_horizontal(pl.col("^auc.*$").is_not_null()))
    named = [pl.lit(row.get(key)).alias(key) for key in CURVE_KEYS]
    frame = kept.select(*named, "step", *columns).sort("step")
    floats = [name for name, kind in frame.schema.items() if kind.is_float()]
    return frame.with_columns(pl.col(floats).round_sig_figs(DIGITS))


def _normalised(value: str) -> str:
    number = _number(value)
    return f"{number:g}" if isinstance(number, float) else value.strip().lower()


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
