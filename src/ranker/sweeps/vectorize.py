"""``sweep.vectorize``: trains the jobs of a sweep in groups before the launcher starts.

A job that was trained in a group has its summary when the launcher comes to it, and is not trained again. What a group
cannot do, the launcher does as ever. Jobs of a killed group go on from their checkpoints, together.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from ranker import config as checks
from ranker import stop_signals
from ranker.errors import UserError
from ranker.hydra_private import announce_only
from ranker.runs import run_lock
from ranker.runs.checkpoint_files import by_step, damage, step_of
from ranker.runs.config_identity import config_hash
from ranker.runs.provenance import cores
from ranker.runs.run_folder import DATA_MODULE, FINISHED, SUMMARY, RunFolder, read_summary
from ranker.sweeps.job import checkpoint_to_resume, clear
from ranker.sweeps.job_list import VECTORIZE, jobs_at_a_time
from ranker.sweeps.journal import Journal

if TYPE_CHECKING:  # imported late: Lightning costs seconds that a sweep without groups need not wait for
    from ranker.vectorized.replica import Job

_LAUNCHERS = ("BasicLauncher", "JoblibLauncher")  # those that run jobs on this machine


@dataclass(frozen=True)
class Group:
    """Jobs that are trained as one.

    Attributes:
        jobs: the jobs.
        order: ``shared`` or ``own``.
        order_seed: the seed of the shared order; None: each job's own.
        sweep_dir: the sweep folder.
        threads: CPU threads where the configuration names no number; None: torch's choice.
    """

    jobs: list[Job]
    order: str
    order_seed: int | None
    sweep_dir: Path
    threads: int | None

    @property
    def name(self) -> str:
        """The numbers of the jobs."""
        numbers = [job.number for job in self.jobs]
        if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
            return f"jobs {numbers[0]} to {numbers[-1]}"
        return ("jobs " if len(numbers) > 1 else "job ") + ", ".join(map(str, numbers))


def train_groups(config: DictConfig, jobs: Sequence[Sequence[str]] | None, *, first: int = 0) -> None:
    """Trains those jobs of a sweep in groups that can be, and says in one line each why others cannot.

    Args:
        config: the configuration of the multirun, with Hydra's own node.
        jobs: overrides of the jobs; None where the sweeper chooses them while it runs.
        first: number of the first job.
    """
    kind = str(config.hydra.launcher.get("_target_", "")).rpartition(".")[2]
    if jobs is None or kind not in _LAUNCHERS:
        what = "this sweeper chooses jobs one by one" if jobs is None else f"{kind} runs jobs elsewhere"
        _say(f"{VECTORIZE}: {what}; every job runs alone")
        return
    composed = [job for number, overrides in enumerate(jobs, first) if (job := _compose(config, overrides, number))]
    workers = jobs_at_a_time(config.hydra.launcher, len(jobs)) or 1
    groups = plan(composed, Path(config.hydra.sweep.dir), workers=workers)
    workers = min(workers, len(groups))
    if workers > 1:
        _in_processes(groups, workers)
    else:
        for group in groups:
            train_group(group)
    states = Journal(config.hydra.sweep.dir).read().states
    announce_only([job for job in range(first, first + len(jobs)) if states.get(job) not in FINISHED])


def plan(jobs: Sequence[Job], sweep_dir: Path, *, workers: int = 1) -> list[Group]:
    """The groups of a sweep: jobs that are missing, may be trained as one, and are not better off alone.

    Jobs that a killed group has left go on together, from the newest checkpoint that all of them have. Which order of
    rows the jobs share depends on the seeds of all jobs of a kind, also of those that are done. So a sweep that is
    started again gives the missing jobs the order that they would have had.

    Args:
        jobs: all jobs of the sweep.
        sweep_dir: the sweep folder.
        workers: groups at a time.
    """
    from ranker.vectorized.alike import chunks, key_of, reasons_alone

    families: dict[str, list[Job]] = defaultdict(list)
    alone: dict[str, int] = defaultdict(int)
    done = _finished(sweep_dir)
    for job in jobs:
        size = int(job.cfg.sweep.vectorize)
        if size > 1 and (reasons := reasons_alone(job.cfg)):
            alone[", ".join(reasons)] += 1
        elif size > 1:
            families[key_of(job.cfg)].append(job)
    for why, count in alone.items():
        _say(f"{VECTORIZE}: {count} jobs run alone, because of {why} (docs/sweeps.md says what a group can do)")
    groups = []
    for family in families.values():
        order, seeds = str(family[0].cfg.sweep.vectorize_order), {job.cfg.seed for job in family}
        seed = None if order == "own" else 0 if len(seeds) > 1 else int(family[0].cfg.seed)
        missing = [job for job in family if job.cfg.force or config_hash(job.cfg) not in done]
        size = int(family[0].cfg.sweep.vectorize)
        for level in _levels(missing, seed):
            count = min(size, max(1, -(-len(level) // workers)))
            for part in ([level[k] for k in chunk] for chunk in chunks(range(len(level)), count)):
                if len(part) > 1 or seed not in (None, part[0].cfg.seed):
                    groups.append(Group(part, order, seed, sweep_dir, cores() // workers if workers > 1 else None))
    return groups


def train_group(group: Group) -> None:
    """Trains one group in this process. A failure is said in one line, and leaves the jobs to the launcher."""
    import torch

    from ranker.vectorized.group import CannotStackError, train

    journal = Journal(group.sweep_dir)
    if group.threads:
        torch.set_num_threads(max(1, group.threads))

    def ended(job: Job, summary: dict[str, object]) -> None:
        journal.add(job.number, str(summary["status"]), run=job.folder)
        _say(f"job {job.number}: {summary['status']} at step {summary['steps']} ({job.folder})")

    with contextlib.ExitStack() as held:
        held.enter_context(stop_signals.taken_over())
        mine = [job for job in group.jobs if _taken(job, held)]
        if not mine:
            return
        for job in mine:
            journal.add(job.number, "started", run=job.folder)
        first = mine[0].checkpoint
        _say(f"{group.name}: trained as one" + (f", from step {step_of(first)} on" if first else ""))
        try:
            train(
                mine,
                order=group.order,
                order_seed=group.order_seed,
                ended=ended,
                say=lambda line: _say(f"{group.name}: {line}"),
            )
            if stop_signals.received():  # while the last jobs were evaluated
                raise stop_signals.Stopped
        except CannotStackError as why:
            _say(f"{group.name}: run alone: {why}")
        except Exception as error:
            if stop_signals.received():
                raise stop_signals.Stopped from error
            _say(f"{group.name}: run alone, since they failed as one: {type(error).__name__}: {checks.one_line(error)}")


def _in_processes(groups: Sequence[Group], workers: int) -> None:
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for _ in pool.map(train_group, groups):
                pass
    except Exception as error:
        if stop_signals.received():
            raise stop_signals.Stopped from error
        _say(f"{VECTORIZE}: a process ended: {type(error).__name__}; what is missing runs alone")


def _compose(config: DictConfig, overrides: Sequence[str], number: int) -> Job | None:
    """A job as its launcher will compose it; None where that fails, which the launcher then reports."""
    from ranker.vectorized.replica import Job

    known = HydraConfig.instance().cfg
    try:
        composed = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.num = composed.hydra.job.id = number
        HydraConfig.instance().set_config(composed)
        folder = Path(str(composed.hydra.sweep.dir), str(composed.hydra.sweep.subdir)).resolve()
        with open_dict(composed):
            del composed["hydra"]
        cfg = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
        assert isinstance(cfg, DictConfig)
        checks.check(cfg)
    except Exception:
        return None
    finally:
        HydraConfig.instance().cfg = known
    return Job(number, cfg, folder)


def _finished(sweep_dir: Path) -> set[str]:
    """Hashes of the runs in the sweep folder that have their result."""
    found = set()
    for path, folders, files in os.walk(sweep_dir):
        if SUMMARY in files:
            folders.clear()
            summary = read_summary(Path(path))
            if summary and summary["status"] in FINISHED:
                found.add(str(summary.get("config_hash")))
    return found


def _levels(jobs: Sequence[Job], order_seed: int | None) -> list[list[Job]]:
    """The jobs by where they go on: those that begin anew, and those that have a checkpoint of the same step.

    A kill may come while the checkpoints of a step are written, so some jobs may have a newer one than the others.
    Each level is the newest step of the job that is furthest behind, and takes all jobs that have a checkpoint of it.
    A job whose checkpoint is of another order of rows goes on alone, in that order.
    """
    new, old = [], {}
    for job in jobs:
        found = {} if job.cfg.force else _checkpoints(job)
        if not found:
            new.append(job)
        elif _order_of(found[max(found)], job) == (job.cfg.seed if order_seed is None else order_seed):
            old[job.number] = (job, found)
    levels = [new] if new else []
    while old:
        step = min(max(found) for _, found in old.values())
        level = [(job, found[step]) for job, found in old.values() if step in found]
        for job, _ in level:
            del old[job.number]
        levels.append([replace(job, checkpoint=path) for job, path in level])
    return levels


def _checkpoints(job: Job) -> dict[int, Path]:
    """The intact checkpoints by step from which a job may go on; empty where it must begin anew."""
    mark = config_hash(job.cfg)
    if not job.folder.is_dir() or checkpoint_to_resume(job.folder, mark) is None:
        return {}
    return {step_of(path): path for path in by_step(RunFolder(job.folder).checkpoints) if damage(path) is None}


def _order_of(checkpoint: Path, job: Job) -> int | None:
    """The seed of the order of rows that a checkpoint was trained in; None if it cannot be read."""
    from ranker.training.table_checkpoints import read_checkpoint

    try:
        return int(read_checkpoint(checkpoint, light=True)[DATA_MODULE].get("order_seed", job.cfg.seed))
    except Exception:  # torch raises many types of errors for an invalid file
        return None


def _taken(job: Job, held: contextlib.ExitStack) -> bool:
    """Takes the folder of a job; False where another process has it, or where it holds another run."""
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(run_lock.held(job.folder))
        if job.checkpoint is None:
            clear(job.folder, config_hash(job.cfg), [])
    except UserError:  # the launcher says so
        return False
    return True


def _say(line: str) -> None:
    print(line, flush=True)
