"""What `clip_stats` reports: one row of numbers a parameter, kept on the device until somebody reads it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from optim.batch import Batch, Moved
from optim.binding import TERMS, global_index, locate
from optim.distributed import combine_max, combine_norm
from optim.registry import get_info
from optim.work import Work

STATE_KEY = "clip_stats"

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


class LastStep(NamedTuple):
    """What the last step did to one parameter; 0-d float64 tensors on its device.

    Attributes:
        sigma: The factor; by unit or row, the smallest.
        direction_max: Infinity norm of r, per unit of learning rate and before sigma; nan where sigma is 0, and where
            there is one sigma a unit or row, from which it cannot be told.
        clipped: Whether the method has a rule that chooses sigma; without one it is 1.
    """

    sigma: Tensor
    direction_max: Tensor
    clipped: bool


class Reasons(NamedTuple):
    """Why each of N tensors got its sigma: vectors [N].

    Attributes:
        sigma: By unit or row, the smallest.
        coordinate: Flat index of the coordinate that decided it.
        term: The largest term of the bound there, a number into TERMS.
        still: Whether the weight there is 0.
    """

    sigma: Tensor
    coordinate: Tensor
    term: Tensor
    still: Tensor


def explain(batch: Batch) -> Reasons:
    """Look at what decided sigma, before the step changes the weights."""
    sigma = _smallest_sigma(batch)
    return Reasons(sigma, *_binding(batch, sigma))


def record(
    batch: Batch,
    reasons: Reasons,
    moved: Moved | None,
    state: Mapping[Tensor, dict[str, Any]],
    ok: Tensor | None,
) -> None:
    """Update the rows of a batch; a skipped step leaves them alone.

    Args:
        batch: The step it has just taken.
        reasons: What `explain` said before it.
        moved: What the backend measured.
        state: The optimizer's state, in which the rows live.
        ok: Whether the step was taken; None when it always is.
    """
    assert moved is not None, "the backend was asked to measure"
    rows = [_row(work, state[work.param]) for work in batch.works]
    before = torch.stack(rows)
    new = _advance(batch, reasons, moved, dict(zip(FIELDS, before.unbind(dim=1), strict=True)))
    after = torch.stack(new, dim=1)
    torch._foreach_copy_(rows, list((after if ok is None else torch.where(ok, after, before)).unbind()))


def _row(work: Work, state: dict[str, Any]) -> Tensor:
    """Return a parameter's row, made at its first step."""
    if STATE_KEY not in state:
        # float64 holds every flat index of a tensor.
        row = torch.zeros(len(FIELDS), dtype=torch.float64, device=work.weight.device)
        row[FIELDS.index("sigma_min")] = torch.inf
        state[STATE_KEY] = row
    return state[STATE_KEY]


def _advance(batch: Batch, reasons: Reasons, moved: Moved, row: dict[str, Tensor]) -> list[Tensor]:
    """Return the new columns, in the order of FIELDS."""
    sigma, groups = reasons.sigma, [group for group, _ in batch.works[0].groups]
    new = {
        "sigma": sigma,
        "sigma_min": torch.minimum(row["sigma_min"], sigma),
        "sigma_mean": row["sigma_mean"] * DECAY + sigma * (1 - DECAY),
        "steps": row["steps"] + 1,
        "clipped_steps": row["clipped_steps"] + (sigma < 1),
        "update_max": combine_max(moved.largest.double(), groups),
        "update_norm": combine_norm(moved.norm.double(), groups),
        "coordinate": reasons.coordinate,
        "term": reasons.term,
        "still": reasons.still,
    }
    return [new[field] for field in FIELDS]


def _smallest_sigma(batch: Batch) -> Tensor:
    """Return the vector [N] of sigma; by unit or row, the smallest of the whole tensor."""
    if batch.sigma is None:
        return torch.ones(len(batch.works), dtype=torch.float64, device=batch.device)
    sigma = batch.sigma.double()
    if not batch.by_unit:
        return sigma
    # The smallest as the inverse of a maximum, which shards can combine and which is 0 where a shard has no unit.
    largest = sigma.reciprocal().amax().view(1) if sigma.numel() else sigma.new_zeros(1)
    return combine_max(largest, [group for group, _ in batch.works[0].groups]).reciprocal()


def _binding(batch: Batch, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors: the flat index of the coordinate that decided sigma, the largest term there, and if w = 0 there.

    All are -1 where sigma is not below 1 or the method looks at no single coordinate.
    """
    if batch.method.binding is None or batch.idle:
        nothing = torch.full_like(sigma, -1)
        return nothing, nothing, nothing
    peaks = batch.peaks() if batch.peaks else [None] * len(batch.works)
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


def last_step(param_groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> dict[str, LastStep]:
    """Return what the last step did by parameter name, on the device; a few kernels a group and device."""
    report: dict[str, LastStep] = {}
    for group in param_groups:
        clipped = get_info(group["method"]).sigma is not None
        rows: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = defaultdict(list)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            row = state.get(param, {}).get(STATE_KEY)
            if row is not None:
                rows[row.device].append((name, param, row))
        for triples in rows.values():
            table = torch.stack([row for _, _, row in triples])
            sigma, moved = table[:, FIELDS.index("sigma")], table[:, FIELDS.index("update_max")]
            direction = torch.where(sigma > 0, moved / (sigma * group["lr"]), torch.nan)
            whole = [not _several_sigmas(group, param) for _, param, _ in triples]
            for (name, *_), one, size, known in zip(triples, sigma.unbind(), direction.unbind(), whole, strict=True):
                report[name] = LastStep(one, size if known else torch.full_like(size, torch.nan), clipped)
    return report


def _several_sigmas(group: Mapping[str, Any], param: Tensor) -> bool:
    by_row = param.grad is not None and param.grad.is_sparse and group["sparse_sigma"] == "row"
    return by_row or (group.get("by") == "unit" and param.ndim > 1)


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
