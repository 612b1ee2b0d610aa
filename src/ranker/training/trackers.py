"""Experiment trackers. The only module that knows Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker.errors import UserError, install_hint, suggest
from ranker.runs.run_folder import METRICS, RunFolder
from ranker.training.metrics_csv import MetricsCsv

KINDS = ("wandb", "csv", "tensorboard", "none")


def wandb_mode() -> str:
    """``WANDB_MODE`` where set, else online for a user who is logged in and offline for everybody else."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    import wandb  # imported late: it costs a second, and most commands never track

    try:
        logged_in = bool(wandb.api.api_key)
    except Exception:  # no netrc, an unreadable one, a malformed key: whatever it is, nobody is logged in
        logged_in = False
    return "online" if logged_in else "offline"


def build(settings: Mapping[str, Any], folder: RunFolder, *, name: str, group: str, tags: list[str]) -> list[Logger]:
    """The loggers of a run: metrics.csv, and the tracker that was asked for.

    Args:
        settings: the ``logger`` group: ``kind``, and for W&B ``project``, ``entity``, ``group``.
        folder: where the files go.
        name: the run's name in the tracker.
        group: name shared by the runs that belong together, such as the seeds of one cell.
        tags: words to filter by.

    Raises:
        UserError: the kind is unknown, or its package is not installed.
    """
    kind = settings["kind"]
    if kind not in KINDS:
        raise UserError(f"logger.kind '{kind}' is unknown; {suggest(kind, KINDS)}")
    loggers: list[Logger] = [] if kind == "none" else [MetricsCsv(folder.path / METRICS)]
    if kind == "wandb":
        import wandb

        loggers.append(
            WandbLogger(
                name=name,
                project=settings["project"],
                entity=settings["entity"],
                group=settings["group"] or group,
                tags=tags,
                save_dir=str(folder.path),
                mode=wandb_mode(),
                settings=wandb.Settings(quiet=True),  # the run prints its own summary, in its own words
            )
        )
    elif kind == "tensorboard":
        try:
            loggers.append(TensorBoardLogger(save_dir=str(folder.path), name="", version="tensorboard"))
        except ModuleNotFoundError as error:
            raise UserError(f"logger=tensorboard needs tensorboard: {install_hint('report')}") from error
    return loggers


@contextmanager
def finishing(loggers: list[Logger]) -> Iterator[None]:
    """Ends the tracker's run with the job's own exit status, also when it crashes or shares its process.

    Under multirun several jobs run in one process, and a run left open would swallow the next job's metrics; a
    run finished with status 0 after an exception would be shown as a success.
    """
    try:
        yield
    except BaseException:
        _finish(loggers, exit_code=1)
        raise
    _finish(loggers, exit_code=0)


@rank_zero_only
def _finish(loggers: list[Logger], *, exit_code: int) -> None:
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            if wandb.run is not None:
                offline, folder = wandb.run.offline, Path(wandb.run.dir).parent
                wandb.finish(exit_code=exit_code)
                if offline:
                    print(f"tracked offline; upload with: wandb sync {folder}", flush=True)
        else:
            logger.finalize("success" if exit_code == 0 else "failed")


@rank_zero_only
def write_config(loggers: list[Logger], cfg: DictConfig) -> None:
    """Gives the tracker the resolved configuration, so that runs can be filtered and grouped by any of its values."""
    for logger in loggers:
        if not isinstance(logger, MetricsCsv):
            logger.log_hyperparams(
                {
                    str(name): OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                    for name, value in cfg.items()
                }
            )


@rank_zero_only
def write_summary(loggers: list[Logger], summary: Mapping[str, Any]) -> None:
    """Puts the end result where the tracker shows it: W&B's summary of the run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            flat = {k: v for k, v in summary.items() if isinstance(v, (str, int, float, bool))}
            for part in ("divergence", "parameters"):
                flat |= {f"{part}/{k}": v for k, v in summary.get(part, {}).items() if v is not None}
            logger.experiment.summary.update({**flat, **summary.get("metrics", {})})


@dataclass(frozen=True)
class TrackedRun:
    """A run as the tracker has it.

    Attributes:
        name: as shown there; the name of its run folder.
        state: ``running``, ``finished``, ``crashed``, ``failed``, ``killed``, ...
        summary: what ``write_summary`` put there: flat, ``divergence/micro`` for what was nested.
        config: the resolved configuration.
    """

    name: str
    state: str
    summary: dict[str, Any]
    config: dict[str, Any]


def tracked_runs(project: str) -> list[TrackedRun]:
    """Every run of a W&B project, oldest first.

    Args:
        project: ``entity/project``.

    Raises:
        UserError: nobody is logged in, or there is no such project, or W&B cannot be reached.
    """
    if project.count("/") != 1 or not all(project.split("/")):
        raise UserError(f"--wandb wants entity/project, such as my-team/evenkeel; got '{project}'")
    import wandb

    if not wandb.api.api_key:  # asked first: wandb itself would wait for somebody to type a key
        raise UserError("not logged in to W&B: run 'wandb login', or set WANDB_API_KEY")
    try:
        found = wandb.Api().runs(project, lazy=False)
        return [TrackedRun(run.name, run.state, dict(run.summary_metrics), dict(run.config)) for run in found]
    except (wandb.Error, ValueError) as error:  # ValueError: what wandb raises for a project that is not there
        raise UserError(f"W&B, {project}: {' '.join(str(error).split())}") from error
