"""What one step has to do: every parameter with a gradient, brought to one dense, local form.

A sparse gradient is coalesced once and becomes the touched rows of its table; a DTensor becomes its local shard and
the process groups over which a reduction must be combined. The rest of the package sees dense tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.distributed import ProcessGroups, local_gradient, local_tensor, shard_groups
from optim.native.rows import gather_rows, moves_rows, scatter_rows
from optim.reductions import Settings
from optim.registry import Method


@dataclass(frozen=True, slots=True)
class Homes:
    """Where touched rows go back to: tables, and copies of their rows that a step writes to.

    Attributes:
        tables: w, and the elementwise state.
        copies: Their rows `index`, one after the other.
        index: [rows], int64.
        native: Whether a C kernel moves them.
    """

    tables: list[Tensor]
    copies: list[Tensor]
    index: Tensor
    native: bool

    @classmethod
    def take(cls, tables: list[Tensor], index: Tensor, *, native: bool) -> Homes:
        """Copy the rows out of their tables."""
        native = native and moves_rows(tables, index)
        copies = gather_rows(tables, index) if native else [table.index_select(0, index) for table in tables]
        return cls(tables, copies, index, native)

    def put_back(self) -> None:
        """Write the rows back."""
        if self.native:
            scatter_rows(self.tables, self.copies, self.index)
        else:
            for table, copy in zip(self.tables, self.copies, strict=True):
                table.index_copy_(0, self.index, copy)


@dataclass(slots=True)
class Work:
    """One parameter in one step.

    Attributes:
        name: The parameter's name.
        param: The parameter, as the user holds it.
        method: How it is treated.
        settings: Its parameter group.
        weight: w: the parameter, its local shard, or a copy of its touched rows.
        grad: g, as autograd left it; same shape as `weight`.
        state: The update's state, in the same form as `weight`; counts are 0-d.
        kept: The update's state as the optimizer keeps it.
        homes: Where the touched rows go back to; None for a dense gradient.
        rows: Indices of the touched rows in `param`; None for a dense gradient.
        groups: Process groups that hold the other shards of this tensor, with the dimension they split.
    """

    name: str
    param: Tensor
    method: Method
    settings: dict[str, Any]
    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    kept: dict[str, Tensor]
    rows: Tensor | None
    homes: Homes | None
    groups: ProcessGroups

    @property
    def unit_dims(self) -> tuple[int, ...] | None:
        """The dimensions a reduction runs over when there is one sigma a row or unit; None for the whole tensor."""
        by_row = self.rows is not None and self.settings["sparse_sigma"] == "row"
        by_unit = self.settings.get("by") == "unit" and self.weight.ndim > 1
        return tuple(range(1, self.weight.ndim)) if by_row or by_unit else None

    def is_finite(self) -> Tensor:
        """Return whether all of the local gradient is finite, as a 0-d bool on its device."""
        if self.grad.numel() == 0:
            return torch.ones((), dtype=torch.bool, device=self.grad.device)
        # One vectorised pass, which NaN survives; the infinity norm is thirty times slower on the CPU.
        least, largest = torch.aminmax(self.grad)
        return least.isfinite() & largest.isfinite()

    def write_back(self) -> None:
        """Put touched rows back into their table; dense tensors were written in place."""
        if self.homes is not None:
            self.homes.put_back()


def make_work(
    name: str, param: Tensor, method: Method, settings: dict[str, Any], state: dict[str, Tensor], *, native: bool
) -> Work:
    """Bring one parameter with a gradient to its dense, local form; `native`: whether C kernels may help.

    Raises:
        ValueError: a sparse gradient with coupled weight decay (which would touch every row) or sparse in more than
            its first dimension.
    """
    assert param.grad is not None, "only parameters with a gradient have work"
    grad = local_gradient(param)
    groups = shard_groups(param)
    weight = local_tensor(param)
    tensors = {key: local_tensor(value) for key, value in state.items()}
    rows, homes = None, None
    if grad.is_sparse:
        if settings["weight_decay"]:
            raise ValueError(
                f"{name}: weight_decay is not defined for sparse gradients; put the table in its own group"
            )
        grad = grad.coalesce()
        if grad.sparse_dim() != 1:
            raise ValueError(f"{name}: gradients must be sparse by rows, got {grad.sparse_dim()} sparse dimensions")
        rows, grad = grad.indices()[0], grad.values()
        tables = [weight, *(value for value in tensors.values() if value.ndim)]
        homes = Homes.take(tables, rows, native=native)
        copies = iter(homes.copies)
        weight = next(copies)
        tensors = {key: next(copies) if value.ndim else value for key, value in tensors.items()}
    return Work(name, param, method, settings, weight, grad, tensors, state, rows, homes, groups)


@dataclass(slots=True)
class Piece:
    """Part of a Work, small enough to stay in cache: views of its tensors, flattened where there is more than one."""

    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]

    def effective(self, settings: Settings) -> tuple[Tensor, Tensor]:
        """Return weight and gradient in the dtype of the computation, with sign and coupled decay applied."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, grad = self.weight.to(dtype), self.grad.to(dtype)
        if settings["maximize"]:
            grad = -grad
        if settings["weight_decay"] and not settings["decoupled_weight_decay"]:
            grad = grad.add(weight, alpha=settings["weight_decay"])
        return weight, grad


CHUNK = 1 << 16
"""Coordinates in a piece on the CPU: the handful of temporaries of a float32 piece fit a 2 MiB cache."""


def pieces(work: Work) -> Iterator[Piece]:
    """Cut a tensor into pieces; one piece where cutting does not pay or sigma needs whole rows."""
    tensors = [work.weight, work.grad, *(value for value in work.state.values() if value.ndim)]
    whole = (
        work.weight.numel() <= CHUNK
        or work.weight.device.type != "cpu"
        or torch.compiler.is_compiling()
        or work.unit_dims is not None
        or not all(tensor.is_contiguous() for tensor in tensors)
    )
    if whole:
        yield Piece(work.weight, work.grad, work.state)
        return
    elementwise = [key for key, value in work.state.items() if value.ndim]
    for weight, grad, *state in zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True):
        yield Piece(weight, grad, {**work.state, **dict(zip(elementwise, state, strict=True))})
