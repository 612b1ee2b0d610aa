"""What `clip_stats` reports: one row of numbers a parameter, kept on the device until somebody reads it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from optim.batch import Batch
from optim.binding import TERMS, global_index, locate
from optim.distributed import combine_max, combine_norm
from optim.reductions import UPDATE_MAX, UPDATE_NORM
from optim.work import Work

STATE_KEY = "clip_stats"
REDUCTIONS = (UPDATE_MAX, UPDATE_NORM)
"""What a report needs besides what the rule asks for."""

STILL = 1e-3
"""A tensor whose sigma is below this hardly moves."""

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
"""Columns of a row. `coordinate` is a flat index, `term` a number into TERMS and `still` whether the weight there is 0;
all three are -1 where no coordinate binds."""


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
        still: Whether a weight of 0 at that coordinate holds the whole tensor still (sigma below 1e-3).
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
    still: bool


def record(batches: Sequence[Batch], state: Mapping[Tensor, dict[str, Any]], ok: Mapping[torch.device, Tensor]) -> None:
    """Update the rows from the step about to be taken; a skipped step leaves them alone.

    Args:
        batches: After `choose_sigma(batch, also=REDUCTIONS)`.
        state: The optimizer's state, in which the rows live.
        ok: By device, whether the step is taken; empty when it always is.
    """
    for batch in batches:
        rows = [_row(work, state[work.param]) for work in batch.works]
        before = torch.stack(rows)
        after = torch.stack(_advance(batch, dict(zip(FIELDS, before.unbind(dim=1), strict=True))), dim=1)
        go = ok.get(batch.device)
        if go is not None:
            after = torch.where(go, after, before)
        torch._foreach_copy_(rows, list(after.unbind()))


def _row(work: Work, state: dict[str, Any]) -> Tensor:
    """Return a parameter's row, made at its first step."""
    if STATE_KEY not in state:
        # float64 holds every flat index of a tensor.
        row = torch.zeros(len(FIELDS), dtype=torch.float64, device=work.weight.device)
        row[FIELDS.index("sigma_min")] = torch.inf
        state[STATE_KEY] = row
    return state[STATE_KEY]


def _advance(batch: Batch, row: dict[str, Tensor]) -> list[Tensor]:
    """Return the new columns, in the order of FIELDS."""
    lr = batch.settings["lr"]
    sigma, update_max, update_norm = _sizes(batch)
    coordinate, term, still = _binding(batch, sigma)
    new = {
        "sigma": sigma,
        "sigma_min": torch.minimum(row["sigma_min"], sigma),
        "sigma_mean": row["sigma_mean"] * DECAY + sigma * (1 - DECAY),
        "steps": row["steps"] + 1,
        "clipped_steps": row["clipped_steps"] + (sigma < 1),
        "update_max": update_max * lr,
        "update_norm": update_norm * lr,
        "coordinate": coordinate,
        "term": term,
        "still": still,
    }
    return [new[field] for field in FIELDS]


def _sizes(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors [N]: the smallest sigma, the infinity norm and the 2-norm of sigma * r."""
    peak, norm = batch.reduced[UPDATE_MAX.name].double(), batch.reduced[UPDATE_NORM.name].double()
    sigma = torch.ones_like(peak) if batch.sigma is None else batch.sigma.double()
    if not batch.by_unit:
        return sigma, sigma * peak, sigma * norm
    groups = [group for group, _ in batch.works[0].groups]
    split = [group for group, dim in batch.works[0].groups if dim == 0]
    # The smallest as the inverse of a maximum, which shards can combine and which is 0 where a shard has no unit.
    slowest = combine_max(_peak(sigma.reciprocal()), groups).reciprocal()
    return slowest, combine_max(_peak(sigma * peak), groups), combine_norm(_norm(sigma * norm), split)


def _peak(values: Tensor) -> Tensor:
    return values.amax().view(1) if values.numel() else values.new_zeros(1)


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values).view(1)


def _binding(batch: Batch, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors: the flat index of the coordinate that decided sigma, the largest term there, and if w = 0 there.

    All are -1 where sigma is not below 1 or the method looks at no single coordinate.
    """
    if batch.method.binding is None or batch.idle:
        nothing = torch.full_like(sigma, -1)
        return nothing, nothing, nothing
    peaks = batch.peaks or [None] * len(batch.works)
    found = [locate(work, peak) for work, peak in zip(batch.works, peaks, strict=True)]
    groups = [group for group, _ in batch.works[0].groups]
    value = torch.stack([place.value for place in found]).double()
    index = torch.stack([global_index(work, place.at) for work, place in zip(batch.works, found, strict=True)])
    term = torch.stack([place.term for place in found]).double()
    still = torch.stack([place.still for place in found]).double()
    mine = (value == combine_max(value, groups)) & (sigma < 1)
    coordinate = combine_max(index.double().where(mine, -1.0), groups)
    mine &= index == coordinate
    return coordinate, combine_max(term.where(mine, -1.0), groups), combine_max(still.where(mine, -1.0), groups)


def read(param_groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> dict[str, ClipStats]:
    """Return the reports by parameter name; one transfer a device."""
    rows: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    names = []
    for group in param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            row = state.get(param, {}).get(STATE_KEY)
            if row is not None:
                names.append(name)
                rows[row.device].append((name, row))
    values = {}
    for pairs in rows.values():
        table = torch.stack([row for _, row in pairs]).tolist()
        values.update({name: dict(zip(FIELDS, row, strict=True)) for (name, _), row in zip(pairs, table, strict=True)})
    return {name: _report(values[name]) for name in names}


def _report(row: dict[str, float]) -> ClipStats:
    steps, clipped = int(row["steps"]), int(row["clipped_steps"])
    return ClipStats(
        sigma=row["sigma"],
        sigma_min=row["sigma_min"],
        sigma_mean=row["sigma_mean"] / (1 - DECAY**steps) if steps else math.nan,
        steps=steps,
        clipped_steps=clipped,
        clipped_fraction=clipped / steps if steps else 0.0,
        update_max=row["update_max"],
        update_norm=row["update_norm"],
        coordinate=int(row["coordinate"]) if row["coordinate"] >= 0 else None,
        term=TERMS[int(row["term"])] if row["term"] >= 0 else None,
        still=row["still"] > 0 and row["sigma"] < STILL,
    )
