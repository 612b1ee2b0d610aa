"""Where a run starts: its folder and lock, what it resumes or continues, and what its other processes are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker import meeting
from ranker.build import Run, is_first_process
from ranker.config import check, is_sweep, outside_folder
from ranker.config_overrides import resumed
from ranker.errors import UserError
from ranker.export.bundle import ABOUT
from ranker.export.parent import exported_parent
from ranker.installation import conf_folder
from ranker.runs import lineage, run_lock, slurm
from ranker.runs.checkpoint_files import by_step
from ranker.runs.config_identity import config_hash
from ranker.runs.run_folder import CHECKPOINT_VARIABLE, CONFIG, RUN_DIR_VARIABLE, RunFolder
from ranker.training.metrics_csv import MetricsCsv
from ranker.training.resumption import sound_checkpoint
from ranker.training.warm_start import Parent


def run_folder(cfg: DictConfig) -> RunFolder:
    """The folder of the run.

    Raises:
        UserError: ``resume`` names a folder that is not a run.
    """
    if cfg.resume is not None:
        return RunFolder.existing(cfg.resume)
    given, output = os.environ.get(RUN_DIR_VARIABLE), Path(HydraConfig.get().runtime.output_dir)
    return RunFolder(given or _requeued(cfg, output) or output)


@contextmanager
def alone_in(folder: RunFolder) -> Iterator[None]:
    """Holds the lock of the run folder, in the first process of the run.

    After a restart by torchrun it waits: on another machine the attempt before may still be ending.
    """
    with run_lock.held(folder.path, wait=_restarted(folder.path)) if is_first_process() else nullcontext():
        yield


def starting_point(cfg: DictConfig, folder: RunFolder, checkpoint: Path | None) -> tuple[DictConfig, Path | None]:
    """The configuration of the run, and the checkpoint to resume from. Refuses what is wrong with either.

    Args:
        cfg: the configuration as composed. With ``resume`` that of the saved run is used.
        folder: the run folder.
        checkpoint: of an earlier attempt at the same run, in Hydra's folder for this job.

    Raises:
        UserError: the run has no checkpoint, a setting cannot change in a resumed run, or a new run would mix its
            files with those of another.
    """
    given = os.environ.get(CHECKPOINT_VARIABLE)  # in the other processes of the run
    checkpoint = checkpoint or (Path(given) if given else None)
    if cfg.resume is None:
        again = checkpoint is None and (_restarted(folder.path) or _requeued(cfg, folder.path) == folder.path)
        if again and by_step(folder.checkpoints):
            checkpoint = folder.newest_checkpoint()
        if checkpoint is None and is_first_process():
            folder.make_room(force=cfg.force or again)
        return cfg, checkpoint
    saved = folder.load_config(trusted=cfg.trust, own=cfg)
    cfg = resumed(cfg, saved, list(HydraConfig.get().overrides.task), conf=conf_folder())
    check(cfg)
    stops = OmegaConf.select(cfg, "callbacks.divergence.stop", default=False)
    return cfg, checkpoint or sound_checkpoint(folder, keep_lost=not stops, say=lambda line: print(line, flush=True))


def _restarted(folder: Path) -> bool:
    """Whether torchrun has started this run again after a failure."""
    ranks = meeting.current()
    return ranks is not None and ranks.earlier == folder


def _requeued(cfg: DictConfig, folder: Path) -> Path | None:
    """The folder of the run that a SLURM job goes on with after it was put back into the queue; None for a new run."""
    if is_sweep() or cfg.force:  # a sweep knows itself which of its runs are missing
        return None
    return slurm.earlier_attempt(folder, config_hash(cfg))


def parent_of(cfg: DictConfig, folder: RunFolder, checkpoint: Path | None) -> Parent | None:
    """The state of the run that a new one continues. What it is becomes part of the configuration.

    Raises:
        UserError: ``warm_start.path`` is none of what a run can start from.
    """
    start = OmegaConf.select(cfg, "warm_start")  # missing in old runs
    if start is None or start.path is None:
        return None
    if checkpoint is not None:  # the run goes on; the parent may be gone by now
        if start.parent is None:
            with open_dict(cfg):
                start.parent = lineage.parent(folder.read_config())
        return None
    path = Path(start.path)
    shards = OmegaConf.select(cfg, "embeddings.name", default="local") == "torchrec"
    if (path / ABOUT).is_file():
        parent = exported_parent(path, shards=shards)
    elif (path / CONFIG).is_file():
        parent = Parent.of_run(path, say=lambda line: print(f"warm_start: {line}", flush=True), shards=shards)
    elif path.is_file():
        parent = Parent.of_checkpoint(path, shards=shards)
    else:
        raise UserError(f"warm_start: {path} is no run folder ({CONFIG}), no export ({ABOUT}) and no checkpoint file")
    with open_dict(cfg):
        start.parent = parent.identity
    return parent


@contextmanager
def own_process_environment(folder: RunFolder, checkpoint: Path | None) -> Iterator[None]:
    """Restores environment variables, arguments and the process group after a job, for the next job of a multirun.

    Lightning starts the other DDP processes by repeating the command line. In a multirun that line describes the whole
    sweep, so it is replaced by the job's own while the job runs. The variables and the process group of a distributed
    job would make the next job wait for processes that have ended.
    """
    environment = dict(os.environ)
    arguments = list(sys.argv)
    os.environ[RUN_DIR_VARIABLE] = str(folder.path)
    hydra = HydraConfig.get()
    run_dir = hydra.run.dir
    _set_run_dir(hydra, str(folder.path))  # where Lightning has Hydra write in the other processes
    if checkpoint is not None:
        os.environ[CHECKPOINT_VARIABLE] = str(checkpoint)
    sys.argv = [arguments[0], *outside_folder(), *HydraConfig.get().overrides.task]
    try:
        yield
    finally:
        sys.argv = arguments
        _set_run_dir(hydra, run_dir)
        os.environ.clear()
        os.environ.update(environment)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _set_run_dir(hydra: Any, path: str) -> None:
    with read_write(hydra):
        hydra.run.dir = path


@rank_zero_only
def continue_files(run: Run) -> None:
    """Drops what the files of a resumed run hold of steps after its checkpoint: these steps will come again."""
    if run.resumption is None:
        return
    run.folder.keep_events_until(run.resumption.step)
    for logger in run.loggers:
        if isinstance(logger, MetricsCsv):
            logger.resume(run.resumption.step)
