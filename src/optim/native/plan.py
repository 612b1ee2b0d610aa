"""`Plan`: the groups of a step, kept for the next one, so that Python looks at each tensor once and not in every part.

Most steps are of the same parameters, in the same memory, with the same state. Only the gradients are new. A model has
many small tensors, and to bring one to its local form, choose its backend and describe it to C costs more than its
arithmetic. The plan compares what may have changed, and takes over the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.local_params import LocalParam
from optim.native.backend import NATIVE, Native, Place, has_plain_memory, is_at, place_of, prepare, replace_tensor
from optim.tensor_group import TensorGroup
from optim.torch_private import is_plain

Make = Callable[[LocalParam], LocalParam]
"""Brings a parameter to its local form again, from an earlier one."""

_NOWHERE = -1
_NO_STATE: Mapping[str, Tensor] = {}
_NOTHING = torch.empty(0, device="cpu")


@dataclass(slots=True)
class _Entry:
    """A parameter with a gradient, and what was seen of it.

    Attributes:
        param: The parameter.
        kind: Its type, which `torch.utils.swap_tensors` changes.
        state: Its state: the key, the tensor (which must not live longer for being seen), and its place.
        group: Its group.
        number: Its number in the group.
        place: Where its weight is; see `is_at`.
    """

    param: Tensor
    kind: type
    state: list[tuple[str, weakref.ref[Tensor], Place]]
    group: TensorGroup
    number: int
    place: Place

    @classmethod
    def of(cls, group: TensorGroup, number: int, kept: Mapping[str, Tensor]) -> _Entry | None:
        """Look at a tensor of a group. None for a shard, and for a state that is not the one that is kept."""
        local = group.locals[number]
        param = local.param
        if local.rows is not None:  # of a sparse gradient: other rows at every step
            return cls(param, type(param), [], group, number, (_NOWHERE, param.shape, param.dtype))
        if not is_plain(param) or any(kept.get(key) is not value for key, value in local.state.items()):
            return None
        state = [(key, weakref.ref(value), place_of(value)) for key, value in local.state.items()]
        return cls(param, type(param), state, group, number, place_of(param))

    def renew(self, grad: Tensor, kept: Mapping[str, Tensor]) -> bool:
        """Take over a new gradient. False, with nothing changed, if anything else is new."""
        param, place = self.param, self.place
        if (
            type(param) is not self.kind
            or not is_at(param, place)
            or not has_plain_memory(grad)
            or grad.dtype is not place[2]
            or grad.shape != place[1]
        ):
            return False
        state = {}
        for key, known, place in self.state:
            tensor = known()
            if tensor is None or kept.get(key) is not tensor or not is_at(tensor, place):
                return False
            state[key] = tensor
        local = self.group.locals[self.number]
        local.weight, local.grad, local.state = param, grad, state
        self.group.prepared.tensors[self.number].grad = grad.data_ptr()
        return True


@dataclass(slots=True)
class Plan:
    """The groups of the last step.

    Attributes:
        groups: The groups, all of them stepped by C.
        treatment: By parameter group: all that decides what its tensors are sorted and stepped by.
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
        """Return the plan of a step that was just prepared.

        None where a tensor is sharded, not stepped by C, or stepped twice because the groups have it twice.
        """
        found: dict[int, _Entry] = {}
        if not all(isinstance(group.backend, Native) and prepare(group).whole for group in groups):
            return None
        for group in groups:
            for number, local in enumerate(group.locals):
                entry = _Entry.of(group, number, state[local.param])
                if entry is None or id(local.param) in found:
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
        """Take over the gradients of the same parameters. False if a new plan must be made: this one is of no use then.

        A parameter that has other memory or another state than before, such as the touched rows of a table, is brought
        to its local form again by `make`.
        """
        if treatment != self.treatment or len(params) != len(self.entries):
            return False
        for position, (param, (known, entry)) in enumerate(zip(params, self.entries, strict=True)):
            grad = param.grad
            if param is not known or (entry is None) != (grad is None):
                return False
            if entry is None or grad is None or entry.renew(grad, state.get(param, _NO_STATE)):
                continue
            old = entry.group.locals[entry.number]
            again = make(old)
            if not NATIVE.takes(again) or again.shard_groups != old.shard_groups:
                return False
            entry.group.locals[entry.number] = again
            new = _Entry.of(entry.group, entry.number, state[param])
            if new is None:
                return False
            self.entries[position] = (param, new)
            replace_tensor(entry.group, entry.number)
        return True

    def release(self) -> None:
        """Let go of gradients, weights and state, which may be replaced and freed before the next step."""
        for group in self.groups:
            group.sigma = group.scratch = None
            for local in group.locals:
                local.weight = local.grad = _NOTHING
                local.rows, local.state, local.tables = None, {}, []
