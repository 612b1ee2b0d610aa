"""Choosing sigma: reduce every tensor, combine over shards, and ask the rule once for many tensors together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from optim.distributed import combine_max, combine_norm
from optim.reductions import Reduction
from optim.work import Work

Reducer = Callable[[Work, Sequence[Reduction]], Mapping[str, Tensor]]
"""Reduces the local part of one tensor."""


def is_idle(work: Work) -> bool:
    """Whether sigma is 1 whatever the tensors hold."""
    method = work.method
    return method.sigma is None or (method.idle is not None and method.idle(work.settings))


def choose_sigma(works: Iterable[Work], reducer: Reducer, also: tuple[Reduction, ...] = ()) -> None:
    """Set `sigma` of every work, None where the rule cannot give anything but 1; and `reduced`.

    Args:
        works: All works of a step, of any groups, devices and shardings.
        reducer: Reduces the local part of one tensor.
        also: Further reductions somebody wants to see, taken in the same pass over memory.
    """
    batches: dict[object, list[Work]] = defaultdict(list)
    for number, work in enumerate(works):
        work.sigma = None
        if also or not is_idle(work):
            apart = number if work.unit_dims is not None else None
            batches[work.weight.device, work.groups, id(work.settings), apart].append(work)
    for batch in batches.values():
        _choose_batch(batch, reducer, also)


def _choose_batch(batch: list[Work], reducer: Reducer, also: tuple[Reduction, ...]) -> None:
    """Choose for works of one parameter group, one device and one sharding; or for a single work by unit."""
    first = batch[0]
    rule = None if is_idle(first) else first.method.sigma
    needed = () if rule is None else first.method.reductions
    reduced = _reduce_batch(batch, tuple(dict.fromkeys((*needed, *also))), reducer)
    sigma = None if rule is None else rule(reduced, first.settings)
    if first.unit_dims is not None:
        first.sigma, first.reduced = sigma, reduced
        return
    for number, work in enumerate(batch):
        work.sigma = None if sigma is None else sigma[number]
        work.reduced = {name: values[number] for name, values in reduced.items()}


def _reduce_batch(batch: list[Work], reductions: Sequence[Reduction], reducer: Reducer) -> dict[str, Tensor]:
    """Reduce tensors to vectors [len(batch)], combined over shards; by unit, a single tensor to one number a unit."""
    local = [reducer(work, reductions) for work in batch]
    by_unit = batch[0].unit_dims is not None
    # Units are rows: a split of dimension 0 keeps each whole on one rank.
    groups = [group for group, dim in batch[0].groups if not (by_unit and dim == 0)]
    combined = {}
    for reduction in reductions:
        values = local[0][reduction.name] if by_unit else _stack([part[reduction.name] for part in local])
        combine = combine_norm if reduction.combine == "norm" else combine_max
        combined[reduction.name] = combine(values, groups)
    return combined


def _stack(values: list[Tensor]) -> Tensor:
    """Stack 0-d tensors, in the widest of their dtypes."""
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return torch.stack([value.to(dtype) for value in values])


def all_finite(works: Sequence[Work], checker: Callable[[Work], Tensor]) -> dict[torch.device, Tensor]:
    """Return, on every device in use, whether every gradient of the whole step is finite; on every rank alike."""
    bad: dict[torch.device, list[Tensor]] = defaultdict(list)
    sharded: dict[object, list[Work]] = defaultdict(list)
    for work in works:
        sharded[work.weight.device, work.groups].append(work)
    for batch in sharded.values():
        flags = torch.stack([checker(work) for work in batch]).all().logical_not().float()
        bad[batch[0].weight.device].append(combine_max(flags, [group for group, _ in batch[0].groups]))
    devices = list(bad)
    worst = [torch.stack(parts).amax() for parts in bad.values()]
    return {
        device: torch.stack([flag.to(device, non_blocking=True) for flag in worst]).amax() == 0 for device in devices
    }
