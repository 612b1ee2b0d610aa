"""Loggers: metrics.csv, Weights & Biases, TensorBoard. The only module that imports wandb."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker.atomic import write_text
from ranker.errors import UserError, install_hint
from ranker.runs.run_folder import METRICS, TRACKER, RunFolder
from ranker.training.lightning_private import rewinds, without_anonymous
from ranker.training.metrics_csv import MetricsCsv


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


@dataclass(frozen=True)
class Tracked:
    """What a logger may want to know of a run.

    Attributes:
        folder: where the files go.
        name: the run's name in the tracker.
        group: name shared by the runs that belong together, such as the seeds of one cell.
        tags: words to filter by.
        tracked: of a resumed run, what ``position`` said at its checkpoint; None if it is not known.
    """

    folder: RunFolder
    name: str
    group: str
    tags: list[str]
    tracked: int | None = None


def metrics_csv(run: Tracked) -> Logger:
    """``metrics.csv`` in the run folder."""
    return MetricsCsv(run.folder.path / METRICS)


def weights_and_biases(
    run: Tracked, *, project: str, entity: str | None = None, group: str | None = None, rewind: bool = False
) -> Logger:
    """Weights & Biases. A resumed run goes on in the run that it began there: the id is kept in the run folder.

    Args:
        run: the run.
        project: the project's name there.
        entity: user or team; None for the user's default.
        group: replaces the group of the run.
        rewind: have W&B drop what a resumed run had tracked after its checkpoint. Without it, these steps are in the
            history twice. Not every server can rewind, and none while it still takes the run for running.
    """
    import wandb

    name = _tracker_id(run.folder.path)
    back: dict[str, Any] = {}
    if rewind and run.tracked:
        # Rows count from 0, and the one that is named is kept.
        back = {"resume": None, "resume_from": f"{name}?_step={run.tracked - 1}"}
    logger = WandbLogger(
        name=run.name,
        id=name,
        project=project,
        entity=entity,
        group=group or run.group,
        tags=run.tags,
        save_dir=str(run.folder.path),
        mode=wandb_mode(),
        settings=wandb.Settings(quiet=True),  # the run prints its own summary
        **back,
    )
    return without_anonymous(logger)


@rank_zero_only
def position(loggers: list[Logger]) -> int | None:
    """Number of rows that W&B has of the run so far; None without W&B."""
    return next((int(logger.experiment.step) for logger in loggers if isinstance(logger, WandbLogger)), None)


def _tracker_id(folder: Path) -> str:
    """The id of the run in W&B: that of its earlier attempt, or of the agent that started it, or a new one."""
    try:
        known = json.loads((folder / TRACKER).read_text(encoding="utf-8"))["wandb"]
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    return str(known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))


def tensorboard(run: Tracked) -> Logger:
    """TensorBoard files in the run folder.

    Raises:
        UserError: the package tensorboard is not installed.
    """
    try:
        return TensorBoardLogger(save_dir=str(run.folder.path), name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise UserError(f"logger=tensorboard needs tensorboard: {install_hint('report')}") from error


def build(settings: DictConfig, run: Tracked) -> list[Logger]:
    """The loggers of a run.

    Args:
        settings: the ``logger`` group: by name, a ``_target_`` that gives a Lightning logger, or a partial one that
            is called with ``run``.
        run: the run.

    Raises:
        UserError: a logger cannot be built.
    """
    loggers = []
    for name, node in current(settings).items():
        made = instantiate(node, _convert_="all")
        logger = made(run) if callable(made) and not isinstance(made, Logger) else made
        if not isinstance(logger, Logger):
            raise UserError(f"logger.{name!s} gives a {type(logger).__name__}, not a Lightning logger")
        loggers.append(logger)
    return loggers


def current(settings: DictConfig) -> DictConfig:
    """The ``logger`` group, also of runs that were saved when it was ``kind`` and the options of W&B."""
    if "kind" not in settings:
        return settings
    kind, here = settings.kind, "ranker.training.trackers"
    nodes: dict[str, Any] = {}
    if kind != "none":
        nodes["csv"] = {"_target_": f"{here}.metrics_csv", "_partial_": True}
    if kind == "wandb":
        options = {key: settings[key] for key in ("project", "entity", "group")}
        nodes["wandb"] = {"_target_": f"{here}.weights_and_biases", "_partial_": True, **options}
    if kind == "tensorboard":
        nodes["tensorboard"] = {"_target_": f"{here}.tensorboard", "_partial_": True}
    return OmegaConf.create(nodes)


@contextmanager
def finishing(loggers: list[Logger]) -> Iterator[None]:
    """Closes the run in the tracker with the exit status of the job, also when the job crashes.

    Under multirun several jobs run in one process. A run that is left open would receive the metrics of the next job,
    and a run closed with status 0 after an exception would be shown as a success.
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
        if isinstance(logger, WandbLogger) and logger.save_dir:
            write_text(Path(logger.save_dir) / TRACKER, json.dumps({"wandb": logger.version}) + "\n")
        if isinstance(logger, WandbLogger) and rewinds(logger):
            _rewind(logger)
        if not isinstance(logger, MetricsCsv):
            logger.log_hyperparams(
                {
                    str(name): OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                    for name, value in cfg.items()
                }
            )


def _rewind(logger: WandbLogger) -> None:
    """Begins the run in W&B at the step of the checkpoint.

    Raises:
        UserError: W&B does not rewind it.
    """
    import wandb

    try:
        _ = logger.experiment
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"W&B does not rewind the run ({reason}); resume with logger.wandb.rewind=false") from error


@rank_zero_only
def write_summary(loggers: list[Logger], summary: Mapping[str, Any]) -> None:
    """Writes the result of the run to its summary in W&B."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            flat = {k: v for k, v in summary.items() if isinstance(v, (str, int, float, bool))}
            for part in ("divergence", "parameters"):
                flat |= {f"{part}/{k}": v for k, v in summary.get(part, {}).items() if v is not None}
            logger.experiment.summary.update({**flat, **summary.get("metrics", {})})


@dataclass(frozen=True)
class TrackedRun:
    """A run as read back from W&B.

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
    """All runs of a W&B project, oldest first.

    Args:
        project: ``entity/project``.

    Raises:
        UserError: not logged in, no such project, or W&B cannot be reached.
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
