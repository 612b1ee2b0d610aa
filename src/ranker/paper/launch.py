"""A study's jobs as one Hydra multirun in a process of its own, which may be killed and started again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ranker.errors import UserError
from ranker.paper.jobs import Job
from ranker.paper.store import write_whole

JOBS = "jobs.json"


def command(program: Path, folder: Path, *, parallel: int) -> list[str]:
    """The multirun over the list of jobs that lies in ``folder``.

    Args:
        program: the Python file that trains.
        folder: the sweep's folder. Studies share one for each data set and scale, and so share their runs.
        parallel: jobs at a time.
    """
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={parallel}"] if parallel > 1 else []
    sweep = ["hydra/sweeper=list", f"hydra.sweeper.jobs={folder / JOBS}", f"hydra.sweep.dir={folder}"]
    return [sys.executable, str(program), "-m", *sweep, *launcher]


def launch(program: Path, folder: Path, jobs: Sequence[Job], *, root: Path, parallel: int) -> None:
    """Runs the jobs that have no finished run in the folder yet; a failed one does not end the others.

    Args:
        program: the Python file that trains.
        folder: the sweep's folder.
        jobs: the jobs.
        root: the working directory of the sweep.
        parallel: jobs at a time.

    Raises:
        UserError: the sweep could not begin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / JOBS, json.dumps([list(job) for job in jobs], indent=1))
    status = subprocess.run(command(program, folder, parallel=parallel), cwd=root, check=False).returncode
    if status not in (0, 1):  # 1: some jobs failed, which the sweep has listed
        raise UserError(f"the sweep in {folder} ended with status {status}; the same command does what is missing")
