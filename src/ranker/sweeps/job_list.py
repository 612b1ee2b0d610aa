"""The jobs of a sweep: read from a file, counted before they start, and how many of them run at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from omegaconf import DictConfig

from ranker.config import ORDERS
from ranker.errors import UserError, one_of
from ranker.hydra_private import expand, parse
from ranker.runs.provenance import cores

VECTORIZE = "sweep.vectorize"


def read_jobs(path: str | Path) -> list[list[str]]:
    """Reads the jobs of ``hydra/sweeper=list``: a YAML or JSON list whose entries are lists of overrides.

    Raises:
        UserError: the file does not exist, or contains something else.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"hydra.sweeper.jobs: no file {path}; give a YAML or JSON list of lists of overrides")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise UserError(f"hydra.sweeper.jobs: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, list) or not found:
        raise UserError(f"hydra.sweeper.jobs: {path} must hold a list of lists of overrides, and at least one")
    for number, job in enumerate(found):
        if not isinstance(job, list) or not all(isinstance(item, str) and "=" in item for item in job):
            raise UserError(f"hydra.sweeper.jobs: entry {number} of {path} must be a list such as [optim=gc, seed=1]")
    return found


def combine(common: Sequence[Sequence[str]], jobs: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each job with each set of common overrides. A job's own value of a key wins; duplicate jobs are removed."""
    combined: dict[tuple[str, ...], None] = {}
    for job in jobs:
        own = {_key(override) for override in job}
        for overrides in common:
            kept = [override for override in overrides if _key(override) not in own]
            combined[(*kept, *job)] = None
    return [list(job) for job in combined]


def count_jobs(config: DictConfig) -> int | None:
    """How many jobs a sweep has; None if only its sweeper can tell.

    Args:
        config: the configuration of the multirun, with Hydra's own node.
    """
    sweeper = config.hydra.sweeper
    if "n_trials" in sweeper:
        return int(sweeper.n_trials)
    jobs = jobs_of(config)
    return None if jobs is None else len(jobs)


def jobs_of(config: DictConfig) -> list[list[str]] | None:
    """The jobs of a sweep, in the order of their numbers; None where its sweeper chooses them while it runs.

    Args:
        config: as for ``count_jobs``.
    """
    sweeper = config.hydra.sweeper
    kind = str(sweeper.get("_target_", "")).rpartition(".")[2]
    if kind not in ("BasicSweeper", "ListSweeper"):
        return None
    with suppress(Exception):  # the sweeper itself reports a wrong override, with a better message
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        jobs = expand(parse([*params, *config.hydra.overrides.task]))
        return combine(jobs, read_jobs(sweeper.jobs)) if kind == "ListSweeper" else jobs
    return None


def wants_groups(config: DictConfig, jobs: Iterable[Sequence[str]] = ()) -> bool:
    """Whether a sweep asks for jobs to be trained in groups (``sweep.vectorize``).

    Args:
        config: as for ``count_jobs``.
        jobs: overrides of its jobs.
    """
    words = [*config.hydra.overrides.task, *(word for job in jobs for word in job)]
    return config.sweep.vectorize > 1 or any(word.startswith(f"{VECTORIZE}=") for word in words)


def is_parallel(launcher: DictConfig) -> bool:
    """Whether the launcher runs jobs in other processes, several at a time."""
    return not str(launcher.get("_target_", "")).endswith(".BasicLauncher")


def jobs_at_a_time(launcher: DictConfig, jobs: int | None) -> int | None:
    """How many jobs share the cores of this machine; None if the launcher gives each job its own allocation.

    Args:
        launcher: the node ``hydra.launcher``.
        jobs: number of jobs in the whole sweep, if known.
    """
    kind = str(launcher.get("_target_", "")).rpartition(".")[2]
    if kind == "JoblibLauncher":
        asked = int(launcher.n_jobs)
        workers = asked if asked > 0 else max(1, cores() + 1 + asked)  # joblib: -1 is every core, -2 all but one
    elif kind == "LocalLauncher":  # submitit on one machine starts all jobs at once
        workers = jobs or cores()
    else:
        return None
    return max(1, min(workers, jobs or workers))


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def check_options(config: DictConfig) -> None:
    """Refuses wrong options of the sweep itself before its first job; Hydra gives them to the jobs only.

    Args:
        config: the configuration of the multirun, with Hydra's own node.

    Raises:
        UserError: a value is out of range or no number.
    """
    given = dict(
        word.split("=", 1) for word in config.hydra.overrides.task if word.startswith("sweep.") and "=" in word
    )
    count = given.get(VECTORIZE, "1")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"{VECTORIZE} must be a whole number of 1 or more, got {count}")
    if (order := given.get("sweep.vectorize_order")) is not None:
        one_of(order, ORDERS, "sweep.vectorize_order")
