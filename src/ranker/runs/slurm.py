"""A run under SLURM: puts its job back into the queue, and finds the run that the job trained before."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ranker.runs.config_identity import config_hash
from ranker.runs.run_folder import CONFIG
from ranker.runs.run_lock import LOCK, job_of
from ranker.trust import read_config


def requeue(job: str) -> str:
    """Puts a job back into the queue.

    Returns:
        What was done, in one line.
    """
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM job {job} was not put back into the queue: {error}"
    if done.returncode:
        return f"SLURM job {job} was not put back into the queue: {' '.join(done.stderr.split()) or done.returncode}"
    return f"SLURM job {job} is back in the queue; the same command goes on with the run"


def earlier_attempt(folder: Path, mark: str) -> Path | None:
    """The folder of the run that this job trained before it was put back into the queue; None if there is none.

    The command of a job stays the same, but its folder may not: the default one has the time of the start in its name.
    So folders beside it are looked at too, whose lock names the job.

    Args:
        folder: where a new run would go.
        mark: hash of the configuration.
    """
    job = job_of(os.environ)
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") in ("", "0"):
        return None
    beside = [lock.parent for lock in folder.parent.glob(f"*/{LOCK}") if f"SLURM job {job}," in lock.read_text()]
    for found in (folder, *sorted(beside, reverse=True)):
        if (found / CONFIG).is_file() and config_hash(read_config(found / CONFIG)) == mark:
            return found
    return None
