"""Runs that were tracked online, as the same table that run folders give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import polars as pl

from ranker.errors import UserError
from ranker.reports.runs import KEYS, run_row
from ranker.training.trackers import TrackedRun, tracked_runs

ENDED = ("crashed", "failed", "killed", "finished")


def load_tracked(project: str) -> pl.DataFrame:
    """One row a run of a W&B project, as ``ranker.reports.runs.load_runs`` describes it.

    Runs that are still going, and runs that are not this project's, are left out. A run that ended without a summary
    (its machine went down) has status ``failed``.

    Args:
        project: ``entity/project``.

    Raises:
        UserError: there is no run, or W&B does not answer.
    """
    summaries = [(run.name, summary(run)) for run in tracked_runs(project)]
    rows = [run_row(found, name) for name, found in summaries if found is not None]
    if not rows:
        raise UserError(f"no finished run of evenkeel in {project}; runs are sent there with logger=wandb")
    return pl.DataFrame(rows, infer_schema_length=None)


def summary(run: TrackedRun) -> dict[str, Any] | None:
    """What the run's summary.json says, put together from what the tracker has; None for a run that is left out."""
    flat = {key: _number(value) for key, value in run.summary.items()}
    if run.state not in ENDED:
        return None
    if "status" not in flat:
        asked = _asked_for(run.config)
        if asked is None:
            return None
        flat = {**asked, "status": "failed", "reason": f"W&B: {run.state}", **flat}
    if any(flat.get(key) is None for key in KEYS):
        return None
    return {
        **{key: flat.get(key) for key in ("lr", "steps", "examples_per_second", "data_wait_fraction")},
        **flat,
        "divergence": {"micro": flat.get("divergence/micro"), "first_step": flat.get("divergence/first_step")},
        "parameters": {"dense": flat.get("parameters/dense")},
        "metrics": {key: value for key, value in flat.items() if key.startswith("test/")},
    }


def _asked_for(config: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        chosen: dict[str, Any] = {key: config[key]["name"] for key in ("data", "scale", "model", "optim")}
        return chosen | {key: config[key] for key in ("lr_mult", "seed")}
    except (KeyError, TypeError):
        return None


def _number(value: Any) -> Any:
    """W&B sends numbers that JSON lacks as words."""
    return math.nan if value in ("NaN", "Infinity", "-Infinity") else value
