"""What a job must know of Hydra's launchers: whether others run beside it, and how many."""

from __future__ import annotations

from omegaconf import DictConfig

from ranker.runs.provenance import cores


def is_parallel(launcher: DictConfig) -> bool:
    """Whether jobs run in processes of their own, several at a time."""
    return not str(launcher.get("_target_", "")).endswith(".BasicLauncher")


def jobs_at_a_time(launcher: DictConfig, jobs: int | None) -> int | None:
    """How many jobs share this machine's cores; None where the launcher gives each job its own allocation.

    Args:
        launcher: ``hydra.launcher``.
        jobs: jobs of the whole sweep, where known.
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
