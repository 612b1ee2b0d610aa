"""What `clip_stats` reports: one row of numbers a parameter, kept on the device until somebody reads it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from optim.distributed import combine_max, combine_norm
from optim.eager import coordinates
from optim.reductions import UPDATE_MAX, UPDATE_NORM
from optim.select import Reducer, reduce_all
from optim.work import Piece, Work

STATE_KEY = "clip_stats"
DECAY = 0.99
"""Of the moving average of sigma: it remembers about a hundred steps."""

FIELDS = (
    "sigma",
    "sigma_min",
    "sigma_mean",
    "steps",
    "clipped_steps",
    "update_max",
    "update_norm",
    "coordinate",
    "term",
    "still",
)
"""Columns of a row. `coordinate` is a flat index and `term` a number into TERMS, both -1 where nothing binds."""

TERMS = ("relative", "absolute", "accumulator")


class ClipStats(TypedDict):
    """The report on one parameter, of the last step unless it says otherwise.

    Attributes:
        sigma: The factor of the step; by unit or row, the smallest.
        sigma_min: The smallest so far.
        sigma_mean: Its exponential moving average (decay 0.99), corrected for the start.
        steps: Steps with a gradient.
        clipped_steps: How many of them had sigma below 1.
        clipped_fraction: clipped_steps / steps.
        update_max: Infinity norm of lr * sigma * r, in units of the weights.
        update_norm: Its 2-norm.
        coordinate: Flat index of the coordinate that decided sigma; None when sigma is 1 or no single one decides.
        term: The largest term of the bound there: "relative", "absolute" or "accumulator"; or None.
    """

    sigma: float
    sigma_min: float
    sigma_mean: float
    steps: int
    clipped_steps: int
    clipped_fraction: float
    update_max: float
    update_norm: float
    coordinate: int | None
    term: str | None


def record(
    works: Sequence[Work], state: Mapping[Tensor, dict[str, Any]], ok: Mapping[torch.device, Tensor], reducer: Reducer
) -> None:
    """Update the row of every work from the step about to be taken; a skipped step leaves it alone."""
    return None


def read(param_groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> dict[str, ClipStats]:
    """Return the reports by parameter name; one transfer a device."""
    return {}
