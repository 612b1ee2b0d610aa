"""Choosing sigma: reduce every tensor, combine over shards, and ask the rule once for many tensors together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from optim.distributed import ProcessGroups, combine_max, combine_norm
from optim.reductions import Reduction
from optim.registry import Method
from optim.work import Work


class Moved(NamedTuple):
    """How far a step moved N tensors: vectors [N] of norms of lr * sigma * r, of the local parts."""

    largest: Tensor
    norm: Tensor


class Backend(Protocol):
    """How tensors are reduced and stepped."""

    def takes(self, work: Work) -> bool:
        """Whether this backend can step this tensor at all."""
        ...

    def renew(self, batch: Batch) -> bool:
        """Take the parameters' gradients of now into a batch that was stepped before, for the next step.

        Return whether that is all it takes. Where anything else has changed, or may have, the batch is worthless.
        """
        ...

    def reduce(self, batch: Batch, reductions: Sequence[Reduction]) -> dict[str, Tensor]:
        """Reduce the local parts: to vectors [N], or for a batch by unit to one number a unit."""
        ...

    def finite(self, batch: Batch) -> Tensor:
        """Return [N] whether all of the local gradients are finite. After `reduce`, much of it may be known."""
        ...

    def apply(self, batch: Batch, ok: Tensor | None, *, measure: bool) -> Moved | None:
        """Take the step with the batch's sigma; where `ok` is false on the device, change nothing by one bit.

        Return how far it went if asked to measure: in the pass that writes, the size of a step costs no memory traffic.
        What is returned where `ok` is false means nothing.
        """
        ...


@dataclass(slots=True)
class Batch:
    """Works of one parameter group, device, sharding and backend: the rule sees them as one vector of N tensors.

    A tensor with one sigma a unit or row is a batch of its own.

    Attributes:
        works: The N works.
        backend: What steps them.
        sigma: [N], or shaped to broadcast over the single tensor by unit; None where it is 1 for sure.
        peaks: Gives by work the binding reduction piece by piece, so that the coordinate can be found again; None where
            the tensor was not cut. None where no tensor was.
        prepared: What the backend keeps between its two passes, and for the next step.
    """

    works: list[Work]
    backend: Backend
    sigma: Tensor | None = None
    peaks: Callable[[], list[Tensor | None]] | None = None
    prepared: Any = None

    @property
    def method(self) -> Method:
        """The method of all works."""
        return self.works[0].method

    @property
    def settings(self) -> dict[str, Any]:
        """The parameter group of all works."""
        return self.works[0].settings

    @property
    def device(self) -> torch.device:
        """The device of all works."""
        return self.works[0].weight.device

    @property
    def by_unit(self) -> bool:
        """Whether this is a single tensor with one sigma a unit or row."""
        return self.works[0].unit_dims is not None

    @property
    def idle(self) -> bool:
        """Whether sigma is 1 whatever the tensors hold."""
        return self.method.sigma is None or (self.method.idle is not None and self.method.idle(self.settings))

    @property
    def clips_gradient(self) -> bool:
        """Whether the update sees sigma * g in place of g: clipping as the word is commonly used."""
        return self.settings.get("clip_accumulator", False) and not self.method.sees_update


def make_batches(works: Iterable[Work], backends: Sequence[Backend]) -> list[Batch]:
    """Sort works into batches; the first backend that takes a work has it."""
    batches: dict[object, list[Work]] = defaultdict(list)
    for number, work in enumerate(works):
        chosen = next(index for index, backend in enumerate(backends) if backend.takes(work))
        apart = None if work.unit_dims is None else number
        batches[id(work.settings), work.method.name, work.weight.device, work.groups, chosen, apart].append(work)
    return [Batch(together, backends[key[4]]) for key, together in batches.items()]  # type: ignore[index]


def choose_sigma(batch: Batch) -> None:
    """Set `sigma` of a batch, whose tensors are looked at, not changed."""
    rule = None if batch.idle else batch.method.sigma
    if rule is None:
        return
    reductions = batch.method.reductions
    # Units are rows: a split of dimension 0 leaves each whole on one rank.
    groups = [group for group, dim in batch.works[0].groups if not (batch.by_unit and dim == 0)]
    local = batch.backend.reduce(batch, reductions)
    reduced = {
        reduction.name: (combine_norm if reduction.combine == "norm" else combine_max)(local[reduction.name], groups)
        for reduction in reductions
    }
    batch.sigma = rule(reduced, batch.settings)


def all_finite(batches: Sequence[Batch]) -> dict[torch.device, Tensor]:
    """Return, on every device in use, whether every gradient of the whole step is finite; on every rank alike.

    Best asked once sigma is chosen.
    """
    sharded: dict[tuple[torch.device, ProcessGroups], list[Tensor]] = defaultdict(list)
    for batch in batches:
        sharded[batch.device, batch.works[0].groups].append(batch.backend.finite(batch).all())
    flags = []
    for (_, groups), together in sharded.items():
        flag = _all(together)
        if groups:
            flag = combine_max(flag.logical_not().float(), [group for group, _ in groups]) == 0
        flags.append(flag)
    devices = dict.fromkeys(device for device, _ in sharded)
    return {device: _all([flag.to(device, non_blocking=True) for flag in flags]) for device in devices}


def _all(flags: Sequence[Tensor]) -> Tensor:
    return flags[0] if len(flags) == 1 else torch.stack([*flags]).all()
