"""Finished runs as one table, one row per run, from run folders or from a W&B project."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from omegaconf import DictConfig, OmegaConf

from ranker.errors import UserError, suggest
from ranker.runs import config_identity
from ranker.runs.config_identity import cell_hash
from ranker.runs.metric_names import TEST
from ranker.runs.run_folder import CONFIG, SUMMARY
from ranker.stability.worth import no_better_than_constant
from ranker.trust import check_resolved, read_config

if TYPE_CHECKING:
    from ranker.training.trackers import TrackedRun

KEYS = ("data", "scale", "model", "optim", "lr_mult", "seed")
CELL = ("data", "scale", "model", "optim", "mitigation", "lr_mult")  # equal for runs that differ only by seed
MADE_WITH = ("reason", "config_hash", "commit", "machine")
COPIED = ("lr", "status", "steps", "examples_per_second", "data_wait_fraction")  # from the summary
LOST = ("diverged", "unsettled", "failed", "interrupted")  # statuses of runs that are in no mean
ENDED = ("crashed", "failed", "killed", "finished")  # states of W&B


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
    """The runs at or below a folder: settings, status, and every metric on the hold-out.

    Columns: data, scale, model, optim, mitigation, lr_mult, seed, lr, status, first_step, micro, unsettled, steps,
    examples_per_second, data_wait_fraction, dense_parameters, reason, config_hash, commit, machine (null for runs of
    older versions), run, cell, folder, ``<task>/<metric>``, and settings such as ``optim.lambda_abs`` that differ
    between runs which are equal in all other columns but the seed.

    Raises:
        UserError: there is no run.
    """
    rows, settings = [], []
    for path in find_runs(folder):
        cfg = _config(path)
        row = _row(json.loads((path / SUMMARY).read_text(encoding="utf-8")), path.name)
        rows.append(row | {"cell": None if cfg is None else cell_hash(cfg), "folder": str(path.resolve())})
        settings.append({} if cfg is None else config_identity.settings(cfg))
    return _table(rows, settings)


def load_tracked(project: str) -> pl.DataFrame:
    """The ended runs of a W&B project, in the format of ``load_runs``.

    Runs of other programs are ignored. A run that ended without a summary, because its machine stopped, has status
    ``failed``.

    Args:
        project: ``entity/project``.

    Raises:
        UserError: there is no run, or W&B cannot be reached.
    """
    from ranker.training.trackers import tracked_runs  # imported late: it imports Lightning, which takes seconds

    found = [(run, summary) for run in tracked_runs(project) if (summary := _tracked_summary(run)) is not None]
    if not found:
        raise UserError(f"no finished run of evenkeel in {project}; runs are sent there with logger=wandb")
    rows = [_row(summary, run.name) | {"cell": summary.get("cell")} for run, summary in found]
    configs = [OmegaConf.create(run.config) for run, _ in found]
    for (run, _), config in zip(found, configs, strict=True):
        check_resolved(config, f"{project}/{run.name}")
    return _table(rows, [config_identity.settings(config) for config in configs])


def metric_names(runs: pl.DataFrame) -> list[str]:
    """Names of the metrics, such as ``click/auc``, in the order of the table."""
    return [column for column in runs.columns if "/" in column]


def by_cell(runs: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """Mean and standard deviation over seeds for each cell: the runs of one configuration but for the seed.

    Args:
        runs: from ``load_runs``, or the CSV it was saved to. An old CSV has no column ``mitigation``.
        metrics: names such as ``is_click/auc``.

    Returns:
        One row per cell: its keys, ``runs``, ``completed`` and each of ``LOST`` (numbers of runs), and for each metric
        ``<metric>/mean`` and ``<metric>/std`` (sample standard deviation) over the completed runs, and
        ``<metric>/useless``, the number of completed runs that are no better than a constant prediction at its task.

    Raises:
        UserError: no run has one of the metrics.
    """
    for metric in metrics:
        if metric not in runs.columns:
            raise UserError(f"no run has the metric '{metric}'; {suggest(metric, metric_names(runs))}")
    done = pl.col("status") == "completed"
    cells = [pl.len().alias("runs")]
    cells += [(pl.col("status") == status).sum().alias(status) for status in ("completed", *LOST)]
    useless = useless_tasks(runs)
    for metric in metrics:
        none = pl.Series([metric.split("/")[0] in tasks for tasks in useless], dtype=pl.Boolean)
        runs = runs.with_columns(none.alias(f"{metric}/useless"))
        cells.append((pl.col(f"{metric}/useless") & done).sum())
        cells.append(pl.col(metric).filter(done).mean().alias(f"{metric}/mean"))
        cells.append(pl.col(metric).filter(done).std().alias(f"{metric}/std"))
    if "mitigation" not in runs.columns:
        runs = runs.with_columns(mitigation=pl.lit("none"))
    keys = [*CELL, *setting_names(runs), *(["cell"] if "cell" in runs.columns else [])]
    return runs.with_columns(pl.col("mitigation").fill_null("none")).group_by(keys, maintain_order=True).agg(cells)


def useless_tasks(runs: pl.DataFrame) -> list[list[str]]:
    """For each run, the tasks at which it is no better than a constant prediction, by what the table has of it."""
    names = metric_names(runs)
    return [no_better_than_constant(dict(zip(names, row, strict=True))) for row in runs.select(names).iter_rows()]


def setting_names(runs: pl.DataFrame) -> list[str]:
    """Columns with settings that differ between runs of one (data, scale, model, optim, mitigation, lr_mult)."""
    return [column for column in runs.columns if "." in column and "/" not in column]


def _table(rows: list[dict[str, Any]], settings: list[dict[str, Any]]) -> pl.DataFrame:
    """The runs with a column for each setting that the columns of ``CELL`` do not tell apart."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row, own in zip(rows, settings, strict=True):
        groups.setdefault(tuple(row[key] for key in CELL), []).append(own)
    differing = {
        key
        for group in groups.values()
        for key in {name for own in group for name in own}
        if "." in key and len({repr(own.get(key)) for own in group if own}) > 1
    }
    for row, own in zip(rows, settings, strict=True):
        row |= {key: None if own.get(key) is None else str(own[key]) for key in sorted(differing)}
    return pl.DataFrame(rows, infer_schema_length=None)


def _config(folder: Path) -> DictConfig | None:
    """The configuration of a run; None for a run that left none, or one that cannot be read."""
    try:
        return read_config(folder / CONFIG)
    except UserError:
        return None


def outcome(summary: Mapping[str, Any]) -> str:
    """The status of a run.

    ``unsettled`` where training ended before it was known whether the model recovered. ``interrupted`` where its user
    or a scheduler ended it, which is no verdict on the model.
    """
    if summary["status"] == "failed" and str(summary.get("reason")).startswith("interrupted"):
        return "interrupted"
    unsettled = summary["status"] == "completed" and summary["divergence"].get("unsettled")
    return "unsettled" if unsettled else str(summary["status"])


def _row(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    row = {key: summary[key] for key in (*KEYS, *COPIED)} | {"status": outcome(summary)}
    found = summary["divergence"]
    row |= {"first_step": found["first_step"], "micro": found["micro"], "unsettled": found.get("unsettled") or 0}
    row |= {"dense_parameters": summary["parameters"]["dense"], "run": name}
    row |= {"mitigation": summary.get("mitigation", "none")} | {key: summary.get(key) for key in MADE_WITH}
    return row | {key.removeprefix(f"{TEST}/"): value for key, value in summary["metrics"].items()}


def _tracked_summary(run: TrackedRun) -> dict[str, Any] | None:
    """The contents of summary.json, rebuilt from the values in W&B; None for a run to ignore."""
    # W&B sends numbers that JSON does not have as strings.
    flat = {k: math.nan if v in ("NaN", "Infinity", "-Infinity") else v for k, v in run.summary.items()}
    if run.state not in ENDED:
        return None
    if "status" not in flat:
        settings = _tracked_settings(run.config)
        if settings is None:
            return None
        flat = {**settings, "status": "failed", "reason": f"W&B: {run.state}", **flat}
    if any(flat.get(key) is None for key in KEYS):
        return None
    return {
        **dict.fromkeys(COPIED),
        **flat,
        "divergence": {key: flat.get(f"divergence/{key}") for key in ("micro", "unsettled", "first_step")},
        "parameters": {"dense": flat.get("parameters/dense")},
        "metrics": {key: value for key, value in flat.items() if key.startswith(f"{TEST}/")},
    }


def _tracked_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        chosen: dict[str, Any] = {key: config[key]["name"] for key in ("data", "scale", "model", "optim")}
        return chosen | {key: config[key] for key in ("lr_mult", "seed")}
    except (KeyError, TypeError):
        return None
