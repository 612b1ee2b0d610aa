"""Tensors that one rule sees together: reduce every tensor, combine over shards, and choose sigma for all at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from optim.local_params import LocalParam, ShardGroups, combine_max, combine_norm
from optim.registry import TERMS, Coordinates, Method, Reduction


class StepSize(NamedTuple):
    """How far a step moved N tensors: vectors [N] of norms of lr * sigma * r, of the local parts."""

    largest: Tensor
    norm: Tensor


class Limiting(NamedTuple):
    """The coordinates that decided sigma of N tensors: vectors [N], of the local parts.

    Attributes:
        value: The limiting reduction at the coordinate.
        position: Its flat index in the local tensor.
        term: The largest term of the bound there, an index into TERMS.
        zero_weight: Whether the weight there is 0.
    """

    value: Tensor
    position: Tensor
    term: Tensor
    zero_weight: Tensor


class Backend(Protocol):
    """How tensors are reduced and stepped."""

    def takes(self, local: LocalParam) -> bool:
        """Whether this backend can step this tensor at all."""
        ...

    def reduce(self, group: TensorGroup, reductions: Sequence[Reduction]) -> dict[str, Tensor]:
        """Reduce the local parts: to vectors [N], or for a group by unit to one number per unit."""
        ...

    def limiting(self, group: TensorGroup) -> Limiting:
        """Find the coordinates that decided sigma. Called after `reduce`, before `apply`, and not for units."""
        ...

    def finite(self, group: TensorGroup) -> Tensor:
        """Return [N], whether all of the local gradients are finite."""
        ...

    def apply(self, group: TensorGroup, ok: Tensor | None, *, measure: bool) -> StepSize | None:
        """Take the step with the group's sigma. Where `ok` is false on the device, change nothing by one bit.

        Return how far it went if asked to measure: the pass that writes has the step at hand. The sizes have no meaning
        where `ok` is false.
        """
        ...

    def apply_and_record(self, group: TensorGroup, ok: Tensor | None, rows: Sequence[Tensor]) -> bool:
        """Take the step and update the rows of `clip_stats`, as `stats.explain` and `stats.record` do around `apply`.

        Return False, with nothing done, where this backend has no faster way for it.
        """
        ...


@dataclass(slots=True)
class TensorGroup:
    """Tensors of one parameter group, device, sharding and backend. The rule sees them as one vector of N tensors.

    A tensor with one sigma per unit or row is a group of its own.

    Attributes:
        locals: The N tensors.
        backend: What steps them.
        sigma: [N], or shaped to broadcast over the single tensor by unit; None where it is 1 for certain.
        scratch: What the backend keeps between `reduce` and `apply`.
        prepared: What the backend keeps between steps of the same tensors.
    """

    locals: list[LocalParam]
    backend: Backend
    sigma: Tensor | None = None
    scratch: Any = None
    prepared: Any = None

    @property
    def method(self) -> Method:
        """The method of all tensors."""
        return self.locals[0].method

    @property
    def settings(self) -> dict[str, Any]:
        """The parameter group of all tensors."""
        return self.locals[0].settings

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.locals[0].weight.device

    @property
    def by_unit(self) -> bool:
        """Whether this is a single tensor with one sigma per unit or row."""
        return self.locals[0].unit_dims is not None

    @property
    def process_groups(self) -> list[Any]:
        """The process groups over which values of whole tensors are combined."""
        return [group for group, _ in self.locals[0].shard_groups]

    @property
    def never_clips(self) -> bool:
        """Whether sigma is 1 whatever the tensors hold."""
        return self.method.sigma is None or self.method.never_clips(self.settings)

    @property
    def clips_gradient(self) -> bool:
        """Whether the update sees sigma * g instead of g, as after torch.nn.utils.clip_grad_norm_."""
        return not self.method.sees_update and self.method.feeds_clipped(self.settings)


def make_groups(locals_: Iterable[LocalParam], backends: Sequence[Backend]) -> list[TensorGroup]:
    """Sort tensors into groups. Each goes to the first backend that takes it."""
    groups: dict[tuple[Any, ...], list[LocalParam]] = defaultdict(list)
    for number, local in enumerate(locals_):
        chosen = 0
        while not backends[chosen].takes(local):
            chosen += 1
        apart = None if local.unit_dims is None else number
        groups[chosen, id(local.settings), local.weight.device, local.shard_groups, apart].append(local)
    return [TensorGroup(together, backends[key[0]]) for key, together in groups.items()]


def choose_sigma(group: TensorGroup) -> None:
    """Set `sigma` of a group. Its tensors are read, not changed."""
    rule = None if group.never_clips else group.method.sigma
    if rule is None:
        return
    reductions = group.method.reductions
    # Units are rows: a split of dimension 0 leaves each row whole on one rank.
    ranks = [ranks for ranks, dim in group.locals[0].shard_groups if not (group.by_unit and dim == 0)]
    local = group.backend.reduce(group, reductions)
    reduced = {
        reduction.name: (combine_norm if reduction.combine == "norm" else combine_max)(local[reduction.name], ranks)
        for reduction in reductions
    }
    group.sigma = rule(reduced, group.settings)


def largest_term(group: TensorGroup, at: Coordinates) -> Tensor:
    """Return which term of the bound is the largest at each coordinate, as an index into TERMS."""
    assert group.method.terms is not None, "a limiting coordinate comes with the terms of its bound"
    sizes = group.method.terms(at, group.settings)
    return torch.stack([sizes[name] for name in TERMS if name in sizes]).argmax(dim=0)


def all_finite(groups: Sequence[TensorGroup]) -> dict[torch.device, Tensor]:
    """Return for every device in use whether every gradient of the whole step is finite; the same on every rank."""
    sharded: dict[tuple[torch.device, ShardGroups], list[Tensor]] = defaultdict(list)
    for group in groups:
        sharded[group.device, group.locals[0].shard_groups].append(group.backend.finite(group).all())
    flags = []
    for (_, ranks), together in sharded.items():
        flag = _all(together)
        if ranks:
            flag = combine_max(flag.logical_not().float(), [group for group, _ in ranks]) == 0
        flags.append(flag)
    devices = dict.fromkeys(device for device, _ in sharded)
    return {device: _all([flag.to(device, non_blocking=True) for flag in flags]) for device in devices}


def _all(flags: Sequence[Tensor]) -> Tensor:
    return flags[0] if len(flags) == 1 else torch.stack([*flags]).all()
