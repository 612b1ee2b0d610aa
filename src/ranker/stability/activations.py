"""How large the activations of a few layers become, and how many of their units are dead, in one forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranker.stability.dead_relus import DeadReluShare, dead_share

_LAYER_OF_AN_MLP = re.compile(r"(.*)\.layers\.(\d+)")


class Activations(NamedTuple):
    """What one layer hands on; scalars on its device.

    Attributes:
        largest: infinity norm of its output, behind its ReLU where it has one; nan where an output is.
        dead: share of its units that are 0 for every row; None without a ReLU.
    """

    largest: Tensor
    dead: Tensor | None


class LayerActivations:
    """Looks at chosen layers of a net inside ``with activations.measuring():``, and costs nothing outside.

    One reduction a layer, no waiting for the device. It does not see into a net compiled by torch.compile.

    Args:
        net: the network.
        layers: module names by role, as ``Ranker.layer_names`` gives them. Layer i of an ``MLP`` is looked at behind
            its ReLU, any other module at its output. A module that is never called, as the heads, which are joined
            into one product, is not seen.
    """

    def __init__(self, net: nn.Module, layers: Mapping[str, str]) -> None:
        self._modules = {role: net.get_submodule(name) for role, name in layers.items()}
        self._relus = {}
        for role, name in layers.items():
            place = _LAYER_OF_AN_MLP.fullmatch(name)
            if place is not None and isinstance(self._modules[role], nn.Linear):
                self._relus[role] = f"{place[1]}.{place[2]}"  # as DeadReluShare names it
                del self._modules[role]
        self._share = DeadReluShare(net, layers=set(self._relus.values()))
        self._outputs: dict[str, Tensor] = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Looks at the forward pass inside; what an earlier one showed is forgotten."""
        self._outputs = {}
        handles = [module.register_forward_hook(self._saw(role)) for role, module in self._modules.items()]
        try:
            with self._share.measuring():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def compute(self) -> dict[str, Activations]:
        """Of the last measurement by role, over the rows of all ranks: one all-reduce, so every rank must call."""
        peaks = self._share.peaks()
        rows = {role: peaks[name] for role, name in self._relus.items() if name in peaks} | self._outputs
        joined = largest_over_ranks(list(rows.values()))
        return {
            role: Activations(row.amax(), dead_share(row) if role in self._relus else None)
            for role, row in zip(rows, joined, strict=True)
        }

    def _saw(self, role: str) -> Callable[[nn.Module, object, Tensor], None]:
        def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._outputs[role] = infinity_norm(output.detach())[None]

        return note


def infinity_norm(x: Tensor) -> Tensor:
    """Largest absolute value, a scalar; nan where an element is. On the CPU far quicker than torch's norm."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def largest_over_ranks(rows: list[Tensor]) -> list[Tensor]:
    """Element by element, the largest over the ranks; in one all-reduce, in which nan counts as infinite."""
    if not rows or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    flat = torch.cat([row.float() for row in rows]).nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return list(flat.split([row.numel() for row in rows]))
