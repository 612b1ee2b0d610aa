"""Every use of torch's private API, with its reason; tests/optim/test_torch_private.py fails where one has changed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# A C++ kernel of torch that steps a whole list of tensors. torch.optim.Adagrad(fused=True) calls it, but cannot be
# given this package's state and its on_nonfinite policy.
_FUSED_ADAGRAD = "_fused_adagrad_"
# Without these two checks a C kernel would read memory that a functorch or functionalization wrapper does not have.
_is_functional_tensor = torch._is_functional_tensor
_is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what it looks like: no subclass (FakeTensor, DTensor), no wrapper of a torch.func transform.

    A wrapper has the type Tensor and no memory of its own.
    """
    exact = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return exact and not _is_functional_tensor(tensor) and not _is_functorch_wrapped(tensor)


@functools.cache
def _has_fused_adagrad(device_type: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_FUSED_ADAGRAD}", key)


def has_fused_adagrad(tensor: Tensor) -> bool:
    """Whether this build of torch has its fused Adagrad kernel for a tensor. It takes plain tensors only."""
    return is_plain(tensor) and _has_fused_adagrad(tensor.device.type)


def fused_adagrad(
    weights: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    eps: float,
    maximize: bool,
    ok: Tensor | None,
) -> None:
    """Step tensors of one device by torch's fused kernel: w <- w - lr * g / (sqrt(G) + eps), G <- G + g^2.

    Args:
        weights: w, contiguous.
        grads: g, contiguous.
        sums: G, contiguous.
        lr: Learning rate. A tensor on a CUDA device is read there.
        weight_decay: Coupled weight decay.
        eps: Added to the root.
        maximize: Whether to ascend.
        ok: 0-d bool on the device: false leaves every tensor as it is. None means true.
    """
    # The kernel wants a step count per tensor, which only its learning rate decay would use.
    steps = list(torch.ones(len(weights), device=weights[0].device).unbind())
    kernel = getattr(torch, _FUSED_ADAGRAD)
    found_inf = None if ok is None else ok.logical_not().float()
    options = {"lr_decay": 0.0, "weight_decay": weight_decay, "eps": eps, "maximize": maximize}
    kernel(weights, grads, sums, steps, lr=lr, **options, found_inf=found_inf)


def copy_all(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into targets: one call, where a loop over small rows costs several microseconds per tensor."""
    torch._foreach_copy_(targets, values)


def shard_shape_and_offsets(param: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shape of a DTensor's local shard and where it begins in the whole tensor. torch has no public way."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return compute_local_shape_and_global_offset(param.shape, mesh, placements)
