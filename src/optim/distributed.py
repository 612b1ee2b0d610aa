"""Sharded parameters: local shards, and the combination of reductions over the ranks that hold the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroups = tuple[tuple["dist.ProcessGroup", int], ...]
"""(process group, dimension of the tensor that is split over it) for every mesh dimension that shards a tensor."""


def _is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor, asked without importing torch.distributed.tensor (which takes a second)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lives on this rank; it shares the tensor's memory."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_gradient(param: Tensor) -> Tensor:
    """Return the local part of the gradient, laid out as the parameter is."""
    grad = param.grad
    assert grad is not None
    if _is_dtensor(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local_tensor(grad)


def shard_groups(param: Tensor) -> ProcessGroups:
    """Return the process groups that split a parameter; empty for a plain or replicated one."""
    if not _is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return tuple(
        (mesh.get_group(number), placement.dim)
        for number, placement in enumerate(placements)
        if hasattr(placement, "dim") and mesh.size(number) > 1
    )


def shard_offsets(param: Tensor) -> tuple[Sequence[int], Sequence[int]] | None:
    """Return the shape of the local shard and where it begins in the whole; None for an unsharded tensor."""
    if not shard_groups(param):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return compute_local_shape_and_global_offset(param.shape, mesh, placements)


def combine_max(values: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Return the maximum over ranks of non-negative values; NaN on any rank gives NaN on all.

    The maximum of a collective leaves NaN to chance, so that a count of NaN travels beside the values.
    """
    if not groups:
        return values
    missing = values.isnan()
    both = torch.stack([values.masked_fill(missing, 0.0), missing.to(values.dtype)])
    for group in groups:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return both[0].masked_fill(both[1] > 0, torch.nan)


def combine_norm(values: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Return the 2-norm over ranks of the parts' 2-norms."""
    if not groups:
        return values
    squares = values.square()
    for group in groups:
        dist.all_reduce(squares, group=group)
    return squares.sqrt()
