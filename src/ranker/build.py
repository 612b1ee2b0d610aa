"""Builds a run from its configuration: its parts, callbacks, loggers and trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker.config import is_sweep
from ranker.data.datamodule import RankingDataModule
from ranker.data.log import Log
from ranker.errors import UserError
from ranker.parts import build_data, build_module, open_log
from ranker.runs import log_identity, objective
from ranker.runs.config_identity import cell_hash
from ranker.runs.run_folder import RUN_DIR_VARIABLE, RunFolder
from ranker.trainer import check_devices, make_trainer
from ranker.training import trackers
from ranker.training.bookkeeping import Bookkeeping
from ranker.training.boundaries import Boundaries
from ranker.training.checkpoints import Checkpoints
from ranker.training.interruption import Interruption
from ranker.training.module import RankingModule
from ranker.training.progress import Say, say_in_log
from ranker.training.resumption import Resumption
from ranker.training.sharpness_probe import SharpnessProbe
from ranker.training.snapshots import is_healthy
from ranker.training.stability_callback import Stability
from ranker.training.warm_start import Parent, WarmStart
from ranker.training.warm_start import settings_of as warm_start_settings

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
        cfg: the resolved configuration; of the saved run if a run resumes.
        folder: the run folder.
        module: the Lightning module.
        datamodule: the Lightning data module.
        trainer: the Lightning trainer.
        bookkeeping: the callback that counts examples and measures the speed.
        stability: the callback that detects divergences, and records and mends them.
        sharpness: the callback that measures sharpness; None where it is switched off.
        interruption: the callback that ends training on request.
        loggers: metrics.csv and the tracker.
        resumption: where the run goes on; None for a new run.
        warm_start: what a new run takes over from an earlier one; None if it starts with random weights, or resumes.
    """

    cfg: DictConfig
    folder: RunFolder
    module: RankingModule
    datamodule: RankingDataModule
    trainer: pl.Trainer
    bookkeeping: Bookkeeping
    stability: Stability
    sharpness: SharpnessProbe | None
    interruption: Interruption
    loggers: list[Logger]
    resumption: Resumption | None
    warm_start: WarmStart | None


@dataclass(frozen=True)
class Shared:
    """What runs that are trained as one have in common, and a run alone makes for itself.

    Attributes:
        log: the log.
        datamodule: the data module.
        say: shows messages in the place of the progress display.
        received: gives the number of the signal that ends all of them.
    """

    log: Log
    datamodule: RankingDataModule
    say: Say
    received: Callable[[], int]


def is_first_process() -> bool:
    """Whether this process started the run, and not another process of it: those find the run folder in a variable."""
    return RUN_DIR_VARIABLE not in os.environ and getattr(rank_zero_only, "rank", 0) == 0


def build(
    cfg: DictConfig,
    folder: RunFolder,
    checkpoint: Path | None,
    parent: Parent | None = None,
    shared: Shared | None = None,
) -> Run:
    """Builds every part of a run.

    Args:
        cfg: the configuration.
        folder: the run folder.
        checkpoint: of an earlier attempt at the same run.
        parent: the state of the run that a new one continues; see ``WarmStart``.
        shared: what the run has in common with others; None for a run alone.

    Raises:
        UserError: something in the configuration cannot be built; the message says what.
    """
    check_devices(cfg)
    pl.seed_everything(cfg.seed, verbose=False)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    log = open_log(cfg) if shared is None else shared.log
    if checkpoint is not None:
        log_identity.check_log(folder.path, log)
    module = build_module(cfg, log.schema)
    if module.tables is not None:
        module.tables.folder = folder.checkpoints
    _check_optimizer(module)
    bookkeeping, interruption = Bookkeeping(), Interruption(shared.received if shared else None)
    stability, others = _configured_callbacks(
        _what_works(cfg, module),
        folder,
        speed=bookkeeping.examples_per_second,
        say=None if shared is None else shared.say,
    )
    other = stability.rollback.optim if stability.rollback else None
    resumption = None if checkpoint is None else Resumption.of(checkpoint, module, other=other)
    warm_start = None
    if parent is not None:
        normalises = cfg.data.dense_statistics != "none"
        warm_start = WarmStart(parent, warm_start_settings(cfg), module=module, normalises=normalises)
        warm_start.history(stability)
        module.warm_start = warm_start
    datamodule = (
        build_data(cfg, log, wrap_training=lambda loader: stability.overheard(bookkeeping.timed(loader)))
        if shared is None
        else shared.datamodule
    )
    tasks = {task.name: task.type for task in log.schema.tasks}
    again = warm_start_settings(cfg)
    if again.at_windows:
        others = [Boundaries(again, stability), *others]
    checkpoints = Checkpoints(
        folder.checkpoints,
        every=cfg.train.checkpoint_every,
        windows=again.at_windows,
        best_by=objective.chosen(cfg.objective, objective.metrics_of(tasks, more=module.holdout_metrics.names())),
        interruption=interruption,
        healthy=lambda: is_healthy(stability.detector),
    )
    if resumption is not None:
        checkpoints.continue_from(resumption.step)
    callbacks: list[Callback] = [bookkeeping, *others, interruption, checkpoints]
    mitigation = [name] if (name := OmegaConf.select(cfg, "mitigation.name", default="none")) != "none" else []
    words = [
        log.schema.name if cfg.data.name == "parquet" else cfg.data.name,
        *(cfg.scale.name, cfg.model.name, cfg.optim.name),
    ]
    loggers = trackers.build(
        cfg.logger,
        trackers.Tracked(
            folder,
            name=folder.path.name,
            # The optimizer first: W&B shows the runs by group, and each legend begins with what is compared.
            group="/".join([words[3], f"x{cfg.lr_mult:g}", words[2], *words[:2], *mitigation, cell_hash(cfg)[:6]]),
            tags=[*words, *mitigation, *_sweep_tag(), *cfg.tags],
            tracked=resumption.tracked if resumption else None,
            step=resumption.step if resumption else None,
            kind=cfg.optim.name,
        ),
    )
    return Run(
        cfg=cfg,
        folder=folder,
        module=module,
        datamodule=datamodule,
        trainer=make_trainer(cfg, folder, callbacks, loggers),
        bookkeeping=bookkeeping,
        stability=stability,
        sharpness=next((c for c in others if isinstance(c, SharpnessProbe)), None),
        interruption=interruption,
        loggers=loggers,
        resumption=resumption,
        warm_start=warm_start,
    )


def _sweep_tag() -> list[str]:
    """A tag that the jobs of a sweep share, by which a tracker shows them alone."""
    return [f"sweep:{Path(HydraConfig.get().sweep.dir).name}"[:64]] if is_sweep() else []  # W&B takes 64 characters


def _configured_callbacks(
    cfg: DictConfig, folder: RunFolder, *, speed: Callable[[], float], say: Say | None
) -> tuple[Stability, list[Callback]]:
    """The callbacks of conf/callbacks, in order, with the stability callback among them.

    The progress bar comes first. The stability callback comes before the early signs, the sharpness probe and a user's
    own callbacks, which look at the state that it leaves. With ``say`` there is no progress bar.
    """
    nodes = dict(cfg.callbacks)
    if say is not None:
        nodes.pop("progress", None)

    def make(name: str, **given: Any) -> Any:
        """The object of a node; None without a node. Objects go to a partial, because Hydra would resolve ``cfg``."""
        node = nodes.pop(name, None)
        try:
            return None if node is None else instantiate(node, _convert_="all", _partial_=True)(**given)
        except TypeError as error:  # an argument that the class does not have
            raise UserError(f"callbacks.{name}: {error}") from error

    progress = make("progress", speed=speed)
    say = say or (progress.say if progress else say_in_log)
    stability = Stability(
        divergence=make("divergence"),
        snapshots=make("snapshots", folder=folder),
        capsules=make("capsules", folder=folder, cfg=cfg, say=say),
        rollback=make("rollback", folder=folder),
        early_stop=make("early_stop"),
        folder=folder,
        say=say,
    )
    made = [progress, stability, *map(make, list(nodes))]
    return stability, [callback for callback in made if callback is not None]


def _what_works(cfg: DictConfig, module: RankingModule) -> DictConfig:
    """The configuration of the callbacks: without what sharded weights and tables do not have. Says so once.

    Raises:
        UserError: something that was asked for does not work with the strategy.
    """
    if (OmegaConf.select(cfg, "trainer.strategy._target_", default="") or "").endswith(".WatchedFSDP"):
        from ranker.training.fsdp import with_what_works  # imported late: it takes a second

        reduced, off = with_what_works(cfg, module.net)
        if off and getattr(rank_zero_only, "rank", 0) == 0:
            print(f"trainer=fsdp: {', '.join(off)} switched off, which need whole weights", flush=True)
        return reduced
    if module.tables is not None and cfg.embeddings.optimizer == "rowwise_adagrad" and cfg.callbacks.get("capsules"):
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(
                "embeddings.optimizer=rowwise_adagrad: callbacks.capsules switched off, a replay has none", flush=True
            )
        cfg = cfg.copy()
        cfg.callbacks.capsules = None
    return cfg


def _check_optimizer(module: RankingModule) -> None:
    """Refuses a wrong hyperparameter now, before processes start and data are read."""
    try:
        module.make_optimizer()
    except (TypeError, ValueError) as error:  # what torch.optim and the optim package raise
        raise UserError(f"optim: {error}") from error
