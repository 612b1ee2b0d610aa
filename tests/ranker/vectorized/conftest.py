"""Jobs of a tiny stream whose rating is observed for half of the rows, trained as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ranker.runs.checkpoint_files import path_of
from ranker.vectorized.group import train
from ranker.vectorized.replica import Job
from vectorized_support import Overrides, job_config


@pytest.fixture
def train_jobs(tmp_path: Path) -> Callable[..., list[Path]]:
    """Trains jobs as one, given as overrides; returns their run folders. Alone is a group of one, see test_group.

    ``only`` names the jobs that are trained, ``from_step`` the checkpoint from which they go on.
    """

    def call(
        name: str,
        *jobs: Overrides,
        order: str = "own",
        order_seed: int | None = None,
        only: Sequence[int] | None = None,
        from_step: int | None = None,
    ) -> list[Path]:
        made = []
        for n, overrides in enumerate(jobs):
            folder = tmp_path / f"{name}{n}"
            checkpoint = None if from_step is None else path_of(folder / "checkpoints", from_step)
            made.append(Job(n, job_config(*overrides), folder, checkpoint))
        if chosen := made if only is None else [made[n] for n in only]:
            train(chosen, order=order, order_seed=order_seed, ended=lambda *_: None, say=lambda _: None)
        return [job.folder for job in made]

    return call
