"""Jobs as data: what a table or a figure asks for, as overrides of train.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Job = tuple[str, ...]
"""Overrides of one run, in the order in which they are given, such as ``("model=small", "lr_mult=2", "seed=0")``."""

# Nothing that costs time and leaves no number behind: a table needs the evaluation at the end alone.
BARE: Job = (
    "logger=none",
    "train.eval_every=0",
    "train.progressive=false",
    "train.checkpoint_every=0",
    "train.threads=1",
    "callbacks.early_signs.every=0",
)
# A figure needs the loss at every step and the hold-out now and then, also of a lost run to its end.
RECORDED: Job = (
    "logger=csv",
    "train.log_every=1",
    "train.eval_every=10",
    "train.progressive=false",
    "train.checkpoint_every=0",
    "train.threads=1",
    "callbacks.divergence.stop=false",
)
UNWATCHED: Job = ("callbacks.early_signs.every=0",)
WATCHED: Job = ("callbacks.early_signs.every=1", "callbacks.early_signs.task_gradients=0")
# --quick: long enough for every part to do its work.
QUICK: Job = ("train.max_steps=60",)

PAPER_MODELS = ("small", "large", "large_dcn")
MORE_MODELS = ("moe", "ple")
METHODS = ("adagrad", "gc", "agc", "lamb", "clippy")
Grids = Mapping[str, tuple[str, tuple[float, ...]]]
"""What is searched, by method: the override's key and its values."""
# The grids of the paper, section 4.1: naive Adagrad and Clippy have nothing to search.
THRESHOLDS: Grids = {
    "gc": ("optim.clip_norm", (1e-1, 1e-2, 1e-3)),
    "agc": ("optim.clip_factor", (1e-2, 1e-3, 1e-4)),
    "lamb": ("optim.trust_coefficient", (1e-1, 1e-2, 1e-3)),
}


@dataclass(frozen=True)
class Data:
    """What differs from one data set to another.

    Attributes:
        name: the option of ``conf/data``.
        validation: overrides that make the day before the test day the hold-out and leave the test day unread.
        auc: the binary task whose AUC selects thresholds and stands in the main table.
        rmse: the regression task beside it.
        fewer_features: overrides for "a subset of the features" of table 3.
        tasks: all tasks, in order.
        dropped: the tasks that table 3 leaves out, one after the other.
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
        validation=("data.days=[2022-04-25,2022-05-07]",),  # the slice's test day is 2022-05-08
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
        # Seven days instead of eight: the hold-out is then the eighth, the full run's last training day, row for row.
        validation=("data.log.train_rows=350000",),
        auc="click",
        rmse="watch_time",
        tasks=("click", "like", "share", "follow", "rating", "watch_time"),
        dropped=("share", "watch_time"),
        fewer_features=("data.drop_features=[" + ",".join(f"signal_{i:02d}" for i in range(0, 20, 2)) + "]",),
    ),
}


@dataclass(frozen=True)
class Setting:
    """What is asked for on the command line.

    Attributes:
        data: which data set.
        scale: ``laptop`` or ``paper``.
        seeds: seeds of each cell.
        quick: fewer cells, one seed: whether the machinery works, not what the numbers are.
        extra: further overrides of every job, such as ``data.source=DIR``.
    """

    data: Data
    scale: str = "laptop"
    seeds: int = 3
    quick: bool = False
    extra: Job = field(default=())

    @property
    def common(self) -> Job:
        """Overrides of every job."""
        return (f"data={self.data.name}", f"scale={self.scale}", *self.extra)


def grid(common: Iterable[str], axes: Mapping[str, Sequence[Any]]) -> list[Job]:
    """Every combination of the axes' values, the last axis fastest.

    Args:
        common: overrides that come first in each job.
        axes: values by key; a value of None leaves the key out.
    """
    jobs = []
    for values in itertools.product(*axes.values()):
        chosen = [f"{key}={_text(value)}" for key, value in zip(axes, values, strict=True) if value is not None]
        jobs.append((*common, *chosen))
    return jobs


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
