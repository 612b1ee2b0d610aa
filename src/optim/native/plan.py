"""`Plan`: the groups of a step, kept for the next one, so that Python looks at each tensor once and not in every part.

Most steps are of the same parameters, in the same memory, with the same state. Only the gradients are new. A model has
many small tensors, and to bring one to its local form, choose its backend and describe it to C costs more than its
arithmetic. The plan compares what may have changed, and takes over the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.local_params import LocalParam
from optim.native.backend import NATIVE, Native, has_plain_memory, prepare, replace_tensor
from optim.tensor_group import TensorGroup
from optim.torch_private import is_plain

Make = Callable[[LocalParam], LocalParam]
"""Brings a parameter to its local form again, from an earlier one."""

_NOWHERE = -1
_NO_GRADIENT = torch.empty(0, device="cpu")  # a plan that held gradients would keep their memory until the next step


@dataclass(slots=True)
class _Entry:
    """A parameter with a gradient, and what was seen of it.

    Attributes:
        param: The parameter.
        kept: What the optimizer keeps of it.
        state: Its state: the key, the tensor, where its memory begins, and its size.
        group: Its group.
        place: Its place in the group.
        pointer: Where the memory of its weight begins.
        shape: Its shape.
        dtype: Its dtype.
    """

    param: Tensor
    kept: Mapping[str, Tensor]
    state: list[tuple[str, Tensor, int, int]]
    group: TensorGroup
    place: int
    pointer: int
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, group: TensorGroup, place: int, kept: Mapping[str, Tensor]) -> _Entry | None:
        """Look at a tensor of a group. None for a shard, and for a state that is not the one that is kept."""
        local = group.locals[place]
        param, weight = local.param, local.weight
        if local.rows is not None:  # of a sparse gradient: other rows at every step
            return cls(param, kept, [], group, place, _NOWHERE, param.shape, param.dtype)
        if not is_plain(param) or any(kept.get(key) is not value for key, value in local.state.items()):
            return None
        state = [(key, value, value.data_ptr(), value.numel()) for key, value in local.state.items()]
        return cls(param, kept, state, group, place, weight.data_ptr(), weight.shape, weight.dtype)

    def renew(self, kept: Mapping[str, Tensor] | None) -> bool:
        """Take over a new gradient. False, with nothing changed, if anything else is new."""
        param, grad = self.param, self.param.grad
        if (
            kept is not self.kept
            or grad is None
            or param.data_ptr() != self.pointer
            or param.shape != self.shape
            or param.dtype is not self.dtype
            or not param.is_contiguous()
            or not has_plain_memory(grad)
            or grad.shape != self.shape
            or grad.dtype is not self.dtype
        ):
            return False
        for key, tensor, pointer, size in self.state:
            if kept.get(key) is not tensor or tensor.data_ptr() != pointer or tensor.numel() != size:
                return False
        self.group.locals[self.place].grad = grad
        self.group.prepared.tensors[self.place].grad = grad.data_ptr()
        return True


@dataclass(slots=True)
class Plan:
    """The groups of the last step.

    Attributes:
        groups: The groups, all of them stepped by C.
        treatment: By parameter group: the group, and how it is treated; see `SigmaOptimizer`.
        entries: By parameter, in the order of the parameter groups: the parameter, and None without a gradient.
    """

    groups: list[TensorGroup]
    treatment: list[tuple[Any, ...]]
    entries: list[tuple[Tensor, _Entry | None]]

    @classmethod
    def of(
        cls,
        groups: list[TensorGroup],
        treatment: list[tuple[Any, ...]],
        params: Sequence[Tensor],
        state: Mapping[Tensor, Mapping[str, Tensor]],
    ) -> Plan | None:
        """Return the plan of a step that was just prepared. None where a tensor is sharded, or not stepped by C."""
        found: dict[int, _Entry] = {}
        if not all(isinstance(group.backend, Native) and prepare(group).whole for group in groups):
            return None
        for group in groups:
            for place, local in enumerate(group.locals):
                entry = _Entry.of(group, place, state[local.param])
                if entry is None:
                    return None
                found[id(local.param)] = entry
        return cls(groups, treatment, [(param, found.get(id(param))) for param in params])

    def renew(
        self,
        treatment: list[tuple[Any, ...]],
        params: Sequence[Tensor],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        make: Make,
    ) -> bool:
        """Take over the gradients of the same parameters. False if a new plan must be made.

        A parameter that has other memory or another state than before, such as the touched rows of a table, is brought
        to its local form again by `make`.
        """
        if treatment != self.treatment or len(params) != len(self.entries):
            return False
        for number, (param, (known, entry)) in enumerate(zip(params, self.entries, strict=True)):
            if param is not known or (entry is None) != (param.grad is None):
                return False
            if entry is None or entry.renew(state.get(param)):
                continue
            old = entry.group.locals[entry.place]
            again = make(old)
            if not NATIVE.takes(again) or again.shard_groups != old.shard_groups:
                return False
            entry.group.locals[entry.place] = again
            new = _Entry.of(entry.group, entry.place, state[param])
            if new is None:
                return False
            self.entries[number] = (param, new)
            replace_tensor(entry.group, entry.place)
        for group in self.groups:
            group.sigma = group.scratch = None
        return True

    def release(self) -> None:
        """Let go of the gradients."""
        for group in self.groups:
            for local in group.locals:
                local.grad = _NO_GRADIENT
