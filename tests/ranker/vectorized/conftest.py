"""Jobs of a tiny stream whose rating is observed for half of the rows, trained as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ranker.vectorized.group import train
from ranker.vectorized.replica import Job
from vectorized_support import Overrides, job_config


@pytest.fixture
def train_jobs(tmp_path: Path) -> Callable[..., list[Path]]:
    """Trains jobs as one, given as overrides; returns their run folders. Alone is a group of one, see test_group."""

    def call(name: str, *jobs: Overrides, order: str = "own", order_seed: int | None = None) -> list[Path]:
        made = [Job(n, job_config(*overrides), tmp_path / f"{name}{n}") for n, overrides in enumerate(jobs)]
        train(made, order=order, order_seed=order_seed, ended=lambda *_: None, say=lambda _: None)
        return [job.folder for job in made]

    return call
