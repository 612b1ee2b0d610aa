"""Training jobs as data: the overrides of ``train.py`` that a study needs, and how they are launched as one sweep."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ranker.atomic import write_text
from ranker.errors import UserError
from ranker.installation import conf_folder

Job = tuple[str, ...]
"""Overrides of one run, in order, such as ``("model=small", "lr_mult=2", "seed=0")``."""

# A study makes hundreds of runs; one capsule of each that is lost is enough.
CAPSULES: Job = ("callbacks.capsules.events=full", "callbacks.capsules.max_capsules=1")
NO_CAPSULES = "callbacks.capsules=null"
# For tables: only the final evaluation is needed, so everything else that costs time is switched off.
BARE: Job = (
    "logger=none",
    "train.eval_every=0",
    "train.progressive=false",
    "train.checkpoint_every=0",
    "train.threads=1",
    "callbacks.early_signs.every=0",
    *CAPSULES,
)
# As BARE, with an evaluation on the hold-out at intervals: what the model had learned when it was lost.
FOLLOWED: Job = (
    "logger=csv",
    "train.log_every=10",
    "train.eval_every=20",
    *(override for override in BARE if not override.startswith(("logger=", "train.eval_every="))),
)
# For figures: the loss at every step and regular evaluations, also after a run has diverged.
RECORDED: Job = (
    "logger=csv",
    "train.log_every=1",
    "train.eval_every=20",
    "train.progressive=false",
    "train.checkpoint_every=0",
    "train.threads=1",
    "callbacks.divergence.stop=false",
    *CAPSULES,
)
UNWATCHED: Job = ("callbacks.early_signs.every=0",)
WATCHED: Job = ("callbacks.early_signs.every=1", "callbacks.early_signs.task_gradients=0")
QUICK: Job = ("train.max_steps=60",)  # for --quick: long enough to exercise every part

PAPER_MODELS = ("small", "large", "large_dcn")
MORE_MODELS = ("moe", "ple")
METHODS = ("adagrad", "gc", "agc", "lamb", "clippy")
LABELS = {"small": "Small", "large": "Large", "large_dcn": "Large+DCN", "moe": "MMoE", "ple": "PLE"}
Grids = Mapping[str, tuple[str, tuple[float, ...]]]
"""Search grid per method: the override key and its values."""
# Section 4.1 of the paper. Naive Adagrad and Clippy have no threshold to search.
THRESHOLDS: Grids = {
    "gc": ("optim.clip_norm", (1e-1, 1e-2, 1e-3)),
    "agc": ("optim.clip_factor", (1e-2, 1e-3, 1e-4)),
    "lamb": ("optim.trust_coefficient", (1e-1, 1e-2, 1e-3)),
}
JOBS_FILE = "jobs.json"
SEEDS = 3  # of a cell, where neither the user nor the study asks for another number


@dataclass(frozen=True)
class Data:
    """Settings that depend on the data set.

    Attributes:
        name: the option of ``conf/data``.
        validation: overrides that hold out the day before the test day and do not read the test day; empty for a
            stream, where ``Setting.validation`` leaves out the last training day.
        auc: the binary task whose AUC selects thresholds and is reported in the main table.
        rmse: the regression task reported next to it.
        fewer_features: overrides for "a subset of the features" in table 3.
        tasks: all tasks, in order.
        dropped: the two tasks that table 3 removes.
    """

    name: str
    validation: Job
    auc: str
    rmse: str
    tasks: tuple[str, ...]
    dropped: tuple[str, str]
    fewer_features: Job


DATA = {
    "kuairand": Data(
        name="kuairand",
        validation=("data.days=[2022-04-25,2022-05-07]",),  # the test day of the slice is 2022-05-08
        auc="is_click",
        rmse="watch_time",
        tasks=("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_profile_enter", "watch_time"),
        dropped=("is_comment", "watch_time"),
        fewer_features=(
            "data.drop_features=[follow_user_num,fans_user_num,friend_user_num,register_days,server_width,server_height]",
        ),
    ),
    "synthetic": Data(
        name="synthetic",
        validation=(),
        auc="click",
        rmse="watch_time",
        tasks=("click", "like", "share", "follow", "rating", "watch_time"),
        dropped=("share", "watch_time"),
        fewer_features=("data.drop_features=[" + ",".join(f"signal_{i:02d}" for i in range(0, 20, 2)) + "]",),
    ),
}


@dataclass(frozen=True)
class Setting:
    """The options of ``scripts/reproduce.py`` that decide which jobs run.

    Attributes:
        data: the data set.
        scale: ``laptop`` or ``paper``.
        seeds: number of seeds per cell; None: the study's own.
        models: models to run, for a study that can run some of its models alone; None: the study's own.
        trials: number of combinations that a search tries for each model and method.
        quick: fewer cells and one seed, to test the code. The numbers are then no results.
        extra: overrides added to every job, such as ``data.source=DIR``.
    """

    data: Data
    scale: str = "laptop"
    seeds: int | None = None
    models: tuple[str, ...] | None = None
    trials: int = 8
    quick: bool = False
    extra: Job = field(default=())

    @property
    def bare(self) -> Job:
        """Common overrides of every job of a table."""
        return (*self.common, *BARE)

    @property
    def common(self) -> Job:
        """Overrides of every job."""
        return (f"data={self.data.name}", f"scale={self.scale}", *self.extra)

    @property
    def validation(self) -> Job:
        """Overrides that hold out the day before the test day and do not read the test day."""
        if self.data.validation:
            return self.data.validation
        # One training day less: the hold-out is then the last training day of the full run, row for row.
        written = yaml.safe_load((conf_folder() / "data" / f"{self.data.name}.yaml").read_text(encoding="utf-8"))["log"]
        given = dict(override.split("=", 1) for override in self.extra)
        rows, day = (int(given.get(f"data.log.{key}", written[key])) for key in ("train_rows", "rows_per_day"))
        return (f"data.log.train_rows={rows - day}",)

    def models_of(self, own: Sequence[str]) -> tuple[str, ...]:
        """The models to run, out of a study's own; the first of them for a quick run."""
        chosen = tuple(model for model in own if self.models is None or model in self.models)
        return chosen[:1] if self.quick else chosen

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds 0, 1, ..."""
        return self.seeds_or(SEEDS)

    def seeds_or(self, number: int) -> tuple[int, ...]:
        """The seeds 0, 1, ..., as many as were asked for, or else a study's own number."""
        return tuple(range(self.seeds or number))


def grid(common: Iterable[str], axes: Mapping[str, Sequence[Any]]) -> list[Job]:
    """The Cartesian product of the axes; the last axis varies fastest.

    Args:
        common: overrides at the start of each job.
        axes: values per key. A value of None omits the key.
    """
    jobs = []
    for values in itertools.product(*axes.values()):
        chosen = [f"{key}={_text(value)}" for key, value in zip(axes, values, strict=True) if value is not None]
        jobs.append((*common, *chosen))
    return jobs


def launch(program: Path, folder: Path, jobs: Sequence[Job], *, parallel: int, vectorize: int = 1) -> None:
    """Runs jobs as one Hydra multirun in a child process. Jobs with a finished run in the folder are skipped.

    A failed job does not stop the others. A killed sweep can be started again.

    Args:
        program: the Python file that trains.
        folder: the sweep folder. Studies with the same data and scale share one, and so share runs.
        jobs: what to run.
        parallel: number of jobs at a time.
        vectorize: up to so many jobs that differ only in seed, rate or optimizer are trained as one; 1: none.

    Raises:
        UserError: the sweep could not start.
    """
    if vectorize > 1:
        jobs = [groupable(job) for job in jobs]
    write_text(folder / JOBS_FILE, json.dumps([list(job) for job in jobs], indent=1))
    command = [sys.executable, str(program), "-m", "hydra/sweeper=list"]
    command += [f"hydra.sweeper.jobs={folder / JOBS_FILE}", f"hydra.sweep.dir={folder}"]
    if vectorize > 1:
        command += [f"sweep.vectorize={vectorize}"]
    if parallel > 1:
        command += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={parallel}"]
    status = subprocess.run(command, check=False).returncode
    if status not in (0, 1):  # 1: some jobs failed; the sweep has already listed them
        raise UserError(f"the sweep in {folder} ended with status {status}; run the same command to continue")


def groupable(job: Job) -> Job:
    """The same run without capsules, whose snapshots a group has K times; one that nobody thins out keeps them."""
    keys = {override.split("=", 1)[0] for override in job}
    if "callbacks.early_signs.every=0" not in job or keys & {"mitigation", "callbacks.rollback.tries"}:
        return job
    return (*(override for override in job if not override.startswith("callbacks.capsules.")), NO_CAPSULES)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
