"""Recorded runs as files: what is in them, and at which step an event begins. Written by trace_recorder.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ranker.atomic import replacing

FORMAT = 3
BLOCK = 50  # steps over which an AUC of the predictions before each step is computed
BAD = 2.0  # a loss is bad where it is this many times its median over the past
NEAR, FEWEST = 10, 3  # an event begins where so many losses in a row have so many bad ones
PAST = 100  # steps; an event before this step is one of the start
LEARNED = 0.53  # a run whose first task has a lower AUC at step 2 PAST is lost or slow from the start
AFTER = 500  # steps that are recorded after the first event
LOG2_UNITS = 100  # log2 of G is stored as a whole number of hundredths: 0.7 % of G
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recorded:
    """A recorded run, as read back from its file.

    Attributes:
        meta: the configuration and what was measured.
        arrays: by name; ``README`` of the folder and ``write`` say which.
    """

    meta: dict[str, Any]
    arrays: dict[str, Array]

    @property
    def steps(self) -> int:
        """Number of steps N."""
        return len(self.arrays["signals"])

    @property
    def losses_NT(self) -> Array:  # noqa: N802
        """Unweighted loss per task."""
        return self.arrays["signals"][:, : len(self.meta["tasks"])]

    @cached_property
    def loss_N(self) -> Array:  # noqa: N802
        """The weighted sum over tasks, which the optimizer minimises."""
        return np.asarray(self.losses_NT.astype(np.float64) @ np.array(self.meta["task_weights"]))

    def sign(self, name: str) -> Array:
        """A sign per step, [N]; nan where it was not measured."""
        return self.arrays["signs"][:, self.meta["sign_names"].index(name)]

    @cached_property
    def log2_g_NP(self) -> Array:  # noqa: N802
        """log2 of the sampled coordinates of G after each step; column 0 .. P - 1 belongs to ``meta['g_layers']``."""
        return np.cumsum(self.arrays["g_log2_change"].astype(np.int32), axis=0) / LOG2_UNITS


def read(path: Path) -> Recorded:
    """Reads a file of ``write``."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return Recorded(meta=json.loads(str(arrays.pop("meta"))), arrays=arrays)


def event_begins(losses: Sequence[float]) -> bool:
    """Whether an event begins after the first ``PAST`` of ``PAST + NEAR`` losses in a row.

    A loss is bad where it is not finite, or at least ``BAD`` times the median of the first ``PAST``. An event begins
    with a bad loss if ``FEWEST`` of the ``NEAR`` losses from there on are bad. One bad loss alone is an outlier among
    the labels: a run of any rate has it at the same rows.
    """
    past, near = losses[:PAST], losses[PAST:]
    limit = BAD * float(np.median(past))
    bad = [not loss < limit for loss in near]
    return bad[0] and sum(bad) >= FEWEST


def first_event(losses: Sequence[float]) -> int | None:
    """First step of the first event after step ``PAST``; None without one. The first loss is that of step 1."""
    places = range(len(losses) - PAST - NEAR + 1)
    return next((i + PAST + 1 for i in places if event_begins(losses[i : i + PAST + NEAR])), None)


def write(run: Recorded, path: Path) -> None:
    """Writes a run as a compressed .npz, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, meta=np.array(json.dumps(run.meta)), **run.arrays)
