"""The loggers of a run: metrics.csv, Weights & Biases, TensorBoard, MLflow, or any other of Lightning's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker.errors import UserError
from ranker.runs.checkpoint_files import Best, by_step, step_of
from ranker.runs.run_folder import CAPSULES, FINISHED, METRICS, RunFolder
from ranker.training import mlflow_tracker, tensorboard_tracker, wandb_tracker
from ranker.training.metrics_csv import MetricsCsv
from ranker.training.row_thinning import Thinning
from ranker.training.tracker import PAGE, Artifact, Histogram, Tracked, Tracker, known_ids
from ranker.training.wandb_tracker import wandb_mode

__all__ = ["Artifact", "Tracked", "wandb_mode"]


def metrics_csv(run: Tracked, *, keep_steps: int = 10_000, stretches: int = 512) -> Logger:
    """``metrics.csv`` in the run folder.

    Args:
        run: the run.
        keep_steps: newest steps of which every row is kept; older rows are thinned (``Thinning``). 0 keeps every row.
        stretches: of old rows, how many stretches are told apart each time that their age doubles.
    """
    return MetricsCsv(run.folder.path / METRICS, Thinning(keep_steps, stretches))


def weights_and_biases(
    run: Tracked,
    *,
    project: str,
    entity: str | None = None,
    group: str | None = None,
    rewind: bool = False,
    alerts: bool = True,
    artifacts: Sequence[str] = (),
) -> Logger:
    """Weights & Biases. A resumed run goes on in the run that it began there: the id is kept in the run folder.

    Args:
        run: the run.
        project: the project's name there.
        entity: user or team; None for the user's default.
        group: replaces the group of the run.
        rewind: have W&B drop what a resumed run had tracked after its checkpoint. Without it, W&B keeps these steps and
            gets the later ones. Not every server can rewind, and none while it still takes the run for running.
        alerts: send an alert when the model is lost, and at a rollback.
        artifacts: what W&B keeps as files: any of ``checkpoint``, ``capsule``, ``report``.
    """
    return wandb_tracker.make(
        run, project=project, entity=entity, group=group, rewind=rewind, alerts=alerts, artifacts=artifacts
    )


def tensorboard(run: Tracked) -> Logger:
    """TensorBoard files in the run folder.

    Raises:
        UserError: the package tensorboard is not installed.
    """
    return tensorboard_tracker.make(run)


def mlflow(run: Tracked, *, tracking_uri: str | None = None, experiment: str = "evenkeel") -> Logger:
    """MLflow, a file of SQLite or a server.

    Args:
        run: the run.
        tracking_uri: ``sqlite:///FILE`` or the address of a server; None for ``MLFLOW_TRACKING_URI``, and where that is
            not set ``mlflow.db`` in the working folder.
        experiment: name of the experiment there.
    """
    return mlflow_tracker.make(run, tracking_uri=tracking_uri, experiment=experiment)


@rank_zero_only
def position(loggers: list[Logger]) -> int | None:
    """Number of rows that W&B has of the run so far; None without W&B."""
    return next((int(logger.experiment.step) for logger in loggers if isinstance(logger, WandbLogger)), None)


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
        try:
            made = instantiate(node, _convert_="all")
            logger = made(run) if callable(made) and not isinstance(made, Logger) else made
        except TypeError as error:  # an argument that the logger does not have
            raise UserError(f"logger.{name!s}: {error}") from error
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
        if isinstance(logger, Tracker):
            logger.close(exit_code=exit_code)
        else:
            logger.finalize("success" if exit_code == 0 else "failed")


@rank_zero_only
def write_config(loggers: list[Logger], cfg: DictConfig, made_with: Mapping[str, Any] | None = None) -> None:
    """Gives the tracker the resolved configuration, so that runs can be filtered and grouped by any of its values.

    Args:
        loggers: the loggers.
        cfg: the configuration.
        made_with: hash, commit, machine and versions, which are shown beside it.
    """
    plain = {
        str(name): OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in cfg.items()
    }
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.begin(plain, made_with or {})
        elif not isinstance(logger, MetricsCsv):
            logger.log_hyperparams({**plain, **(made_with or {})})


def _trackers(loggers: Iterable[Logger]) -> list[Tracker]:
    """The loggers that are more than Lightning's, in the first process; none in the others."""
    first = getattr(rank_zero_only, "rank", 0) == 0
    return [logger for logger in loggers if isinstance(logger, Tracker)] if first else []


def alert(loggers: Iterable[Logger], title: str, text: str, *, serious: bool) -> None:
    """Tells the trackers of an event; see ``Tracker.alert``."""
    for tracker in _trackers(loggers):
        tracker.alert(title, text, serious=serious)


def histograms(loggers: Iterable[Logger], found: Mapping[str, Histogram], step: int) -> None:
    """Gives the trackers histograms of a step. ``metrics.csv`` and MLflow have no place for them."""
    for tracker in _trackers(loggers):
        tracker.histograms(found, step)


def write_summary(loggers: list[Logger], summary: Mapping[str, Any], folder: RunFolder | None = None) -> None:
    """Writes the result of the run to the trackers, and gives them the files of a run that has ended.

    Args:
        loggers: the loggers.
        summary: the content of summary.json.
        folder: the run folder; without one no files are given.
    """
    for tracker in _trackers(loggers):
        tracker.result(summary)
        # A failed run is resumed from its checkpoints, so they are not its result.
        for artifact in left_by(folder) if folder and summary["status"] in FINISHED else ():
            tracker.keep(artifact)


def left_by(folder: RunFolder) -> Iterator[Artifact]:
    """The files of a run that a tracker may keep: its last and its best checkpoint, capsules, and the page."""
    if checkpoints := by_step(folder.checkpoints):
        yield Artifact("checkpoint", checkpoints[-1], (f"step-{step_of(checkpoints[-1])}",))
    if best := Best.read(folder.checkpoints):
        yield Artifact("checkpoint", best.path(folder.checkpoints), ("best",))
    for capsule in sorted((folder.path / CAPSULES).glob("*")):
        yield Artifact("capsule", capsule, (capsule.name.replace("=", "-"),))
    if (page := folder.path / PAGE).is_file():
        yield Artifact("report", page)


def wants(loggers: Iterable[Logger], kind: str) -> bool:
    """Whether a tracker keeps files of a kind."""
    return any(kind in getattr(tracker, "artifacts", ()) for tracker in _trackers(loggers))


def keep_later(folder: Path, artifact: Artifact) -> None:
    """Gives W&B files that were made after the run ended, such as an export.

    Args:
        folder: the run folder.
        artifact: the files.

    Raises:
        UserError: the run was not tracked in W&B.
    """
    settings = RunFolder.existing(folder).read_config().get("logger")
    node = OmegaConf.select(current(settings), "wandb") if settings is not None else None
    if node is None or "wandb" not in known_ids(folder):
        raise UserError(f"{folder} was not tracked in W&B, so it has no run there; leave out --wandb")
    with wandb_tracker.opened_again(folder, project=node.project, entity=node.get("entity")) as run:
        wandb_tracker.log_artifact(run, artifact)


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
