"""What `clip_stats` and `last_step` report: one row of numbers per parameter, kept on the device until it is read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from optim import torch_private
from optim.checkpoint import ROW
from optim.local_params import LocalParam, combine_max, combine_norm, has_several_sigmas, lasting, named_params
from optim.registry import TERMS, get_info
from optim.tensor_group import StepSize, TensorGroup

STATE_KEY = ROW

STILL = 1e-3
"""A tensor whose sigma is below this hardly moves."""

DECAY = 0.99
"""Of the moving average of sigma: its memory is about a hundred steps."""

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
"""Columns of a row. `coordinate` is a flat index, `term` an index into TERMS, `still` is 1 where the weight there is 0.
All three are -1 where no coordinate limits sigma."""


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
        still: Whether a weight of 0 at that coordinate keeps the whole tensor from moving (sigma below 1e-3).
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
        direction_max: Infinity norm of r, per unit of learning rate and before sigma. NaN where sigma is 0, and where
            there is one sigma per unit or row, because it cannot be computed then.
        clipped: Whether the method has a rule that chooses sigma. Without one it is 1.
    """

    sigma: Tensor
    direction_max: Tensor
    clipped: bool


class Reasons(NamedTuple):
    """Why each of N tensors got its sigma: vectors [N].

    Attributes:
        sigma: By unit or row, the smallest.
        coordinate: Flat index of the coordinate that decided it.
        term: The largest term of the bound there, an index into TERMS.
        still: Whether the weight there is 0.
    """

    sigma: Tensor
    coordinate: Tensor
    term: Tensor
    still: Tensor


def explain(group: TensorGroup) -> Reasons:
    """Find what decided sigma. Must run before the step changes the weights."""
    sigma = _smallest_sigma(group)
    if group.method.limiting is None or group.never_clips:
        nothing = torch.full_like(sigma, -1)
        return Reasons(sigma, nothing, nothing, nothing)
    found, ranks = group.backend.limiting(group), group.process_groups
    value = found.value.double()
    index = torch.stack([_global_index(*pair) for pair in zip(group.locals, found.position.unbind(), strict=True)])
    mine = (value == combine_max(value, ranks)) & (sigma < 1)
    coordinate = combine_max(index.double().where(mine, -1.0), ranks)
    mine &= index == coordinate
    term, still = (combine_max(part.double().where(mine, -1.0), ranks) for part in (found.term, found.zero_weight))
    return Reasons(sigma, coordinate, term, still)


def _smallest_sigma(group: TensorGroup) -> Tensor:
    """Return the vector [N] of sigma; by unit or row, the smallest of the whole tensor."""
    if group.sigma is None:
        return torch.ones(len(group.locals), dtype=torch.float64, device=group.device)
    sigma = group.sigma.double()
    if not group.by_unit:
        return sigma
    # The smallest as the inverse of a maximum, which shards can combine and which is 0 where a shard has no unit.
    largest = sigma.reciprocal().amax().view(1) if sigma.numel() else sigma.new_zeros(1)
    return combine_max(largest, group.process_groups).reciprocal()


def _global_index(local: LocalParam, index: Tensor) -> Tensor:
    """Return the flat index in the whole parameter of a flat index among its touched rows or in its local shard."""
    rows, shape = local.rows, local.param.shape
    if rows is not None:
        if not rows.numel():
            return index
        width = max(1, shape[1:].numel())
        return rows.index_select(0, (index // width).view(1)).view(()) * width + index % width
    if not local.shard_groups:
        return index
    local_shape, offsets = torch_private.shard_shape_and_offsets(local.param)
    result, stride = torch.zeros_like(index), 1
    for size, local_size, offset in zip(reversed(shape), reversed(local_shape), reversed(offsets), strict=True):
        result += (index % max(1, local_size) + offset) * stride
        index = index // max(1, local_size)
        stride *= size
    return result


def record(
    group: TensorGroup,
    reasons: Reasons,
    size: StepSize | None,
    rows: list[Tensor],
    ok: Tensor | None,
) -> None:
    """Update the rows of a group. A skipped step leaves them as they are.

    Args:
        group: The step it has just taken.
        reasons: What `explain` returned before it.
        size: What the backend measured.
        rows: Those of `rows_of`.
        ok: Whether the step was taken; None when it always is.
    """
    assert size is not None, "the backend was asked to measure"
    before = torch.stack(rows)
    row = dict(zip(FIELDS, before.unbind(dim=1), strict=True))
    sigma, ranks = reasons.sigma, group.process_groups
    new = {
        "sigma": sigma,
        **_summed(row, sigma, group.settings["lr"]),
        "update_max": combine_max(size.largest.double(), ranks),
        "update_norm": combine_norm(size.norm.double(), ranks),
        "coordinate": reasons.coordinate,
        "term": reasons.term,
        "still": reasons.still,
    }
    after = torch.stack([new[field] for field in FIELDS], dim=1)
    torch_private.copy_all(rows, list((after if ok is None else torch.where(ok, after, before)).unbind()))


def _summed(row: Mapping[str, Tensor], sigma: Tensor, lr: float | Tensor) -> dict[str, Tensor]:
    """Return the fields that sum up all steps. A step at learning rate 0 is none.

    torch.distributed.checkpoint takes one to make the state.
    """
    new = {
        "sigma_min": torch.minimum(row["sigma_min"], sigma),
        "sigma_mean": row["sigma_mean"] * DECAY + sigma * (1 - DECAY),
        "steps": row["steps"] + 1,
        "clipped_steps": row["clipped_steps"] + (sigma < 1),
    }
    if not isinstance(lr, Tensor):
        return new if lr else {field: row[field] for field in new}
    counts = torch.zeros_like(sigma) + lr != 0
    return {field: torch.where(counts, value, row[field]) for field, value in new.items()}


def rows_of(group: TensorGroup, state: Mapping[Tensor, dict[str, Any]]) -> list[Tensor]:
    """Return the rows of a group's parameters, which are in the optimizer's state."""
    return [_row(local, state[local.param]) for local in group.locals]


def _row(local: LocalParam, state: dict[str, Any]) -> Tensor:
    """Return a parameter's row, made at its first step."""
    if STATE_KEY not in state:
        # float64 can represent every flat index of a tensor.
        with lasting():
            row = torch.zeros(len(FIELDS), dtype=torch.float64, device=local.weight.device)
            row.select(0, FIELDS.index("sigma_min")).fill_(torch.inf)  # item assignment would copy from the host
        state[STATE_KEY] = row
    known: Tensor = state[STATE_KEY]
    return known


def read(param_groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> dict[str, ClipStats]:
    """Return the reports by parameter name; one transfer per device."""
    rows: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    names = []
    for _, name, param in named_params(param_groups):
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
    """Return what the last step did by parameter name, on the device; a few kernels per group and device."""
    report: dict[str, LastStep] = {}
    rows: dict[tuple[int, torch.device], list[tuple[str, Tensor, Tensor]]] = defaultdict(list)
    for group, name, param in named_params(param_groups):
        row = state.get(param, {}).get(STATE_KEY)
        if row is not None:
            rows[id(group), row.device].append((name, param, row))
    groups = {id(group): group for group in param_groups}
    for (key, _), triples in rows.items():
        group, method = groups[key], get_info(groups[key]["method"])
        table = torch.stack([row for _, _, row in triples])
        sigma, moved = (table.select(1, FIELDS.index(field)) for field in ("sigma", "update_max"))
        direction = torch.where(sigma > 0, moved / (sigma * group["lr"]), torch.nan)
        for (name, param, _), one, size in zip(triples, sigma.unbind(), direction.unbind(), strict=True):
            sparse = param.grad is not None and param.grad.is_sparse
            if has_several_sigmas(method, group, param.ndim, sparse=sparse):
                size = torch.full_like(size, torch.nan)
            report[name] = LastStep(one, size, method.sigma is not None)
    return report


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
