"""Rules for vmap that give each replica the bits that it gets alone.

A rounding error of the first step is, some hundred steps later, as large as the difference between two seeds. So the
operations here, forward and backward, are those kernels whose result for each replica is that of this replica alone:
``baddbmm`` adds the bias inside the product, which vmap's own rule does not. On the processor that this was tested on
(AMD EPYC), replicas of all models of this project were equal to runs alone to the bit, with batches of 256 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WIDE = 4  # outputs from which on a batched product is that of the single ones to the bit


class AsAlone(TorchFunctionMode):
    """Has linear layers, layer norm and log loss computed as for each replica alone, whatever calls them under vmap.

    vmap's own rules are right up to rounding. They stay for everything else, where they give the same bits.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and args[0].dim() == 2:
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        if func is F.binary_cross_entropy_with_logits and _is_elementwise(kwargs or {}):
            return _LogLoss.apply(*args[:2])
        if func is F.layer_norm:
            return _LayerNorm.apply(*_layer_norm_arguments(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """x W^T + b, with a rule for vmap."""

    @staticmethod
    def forward(x_BD: Tensor, weight_HD: Tensor, bias_H: Tensor | None) -> Tensor:
        return F.linear(x_BD, weight_HD, bias_H)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: gradients are taken outside of vmap, from what its rule computes."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        parts = _stacked(info.batch_size, in_dims, (x, weight, bias))
        return _Products.apply(*parts), 0


class _Products(torch.autograd.Function):
    """x_k W_k^T + b_k for every replica k."""

    @staticmethod
    def forward(ctx: Any, x_KBD: Tensor, weight_KHD: Tensor, bias_KH: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_KBD, weight_KHD)
        if weight_KHD.shape[1] < _WIDE:
            biases = [None] * len(x_KBD) if bias_KH is None else bias_KH.unbind()
            return torch.stack([F.linear(*one) for one in zip(x_KBD, weight_KHD, biases, strict=True)])
        weight_KDH = weight_KHD.transpose(1, 2)
        return x_KBD.bmm(weight_KDH) if bias_KH is None else torch.baddbmm(bias_KH[:, None], x_KBD, weight_KDH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_KBD, weight_KHD = ctx.saved_tensors
        grad_KBH = grads[0].contiguous()  # a sum over rows adds them in another order where they lie otherwise
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_weight = None
        if wants_weight and weight_KHD.shape[1] < _WIDE:
            grad_weight = torch.stack([grad.t().mm(x) for grad, x in zip(grad_KBH, x_KBD, strict=True)])
        elif wants_weight:
            grad_weight = grad_KBH.transpose(1, 2).bmm(x_KBD)
        return grad_KBH.bmm(weight_KHD) if wants_x else None, grad_weight, grad_KBH.sum(1) if wants_bias else None


class _LogLoss(torch.autograd.Function):
    """The log loss of logits, element by element. Its rule for vmap is itself: vmap's own is another formula."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """As for ``_Linear``."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        z, y = _stacked(info.batch_size, in_dims, (logits, labels))
        assert z is not None
        assert y is not None
        return F.binary_cross_entropy_with_logits(z, y, reduction="none"), 0


class _LayerNorm(torch.autograd.Function):
    """Layer norm, with a rule for vmap that calls it once for each replica: the gradients of its weights are sums."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float) -> Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """As for ``_Linear``."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
    ) -> tuple[Tensor, int]:
        parts = _stacked(info.batch_size, in_dims, (x, weight, bias))
        each = zip(*([None] * info.batch_size if part is None else part.unbind() for part in parts), strict=True)
        return torch.stack([F.layer_norm(one, shape, w, b, eps) for one, w, b in each]), 0


def _layer_norm_arguments(
    input: Tensor,  # noqa: A002  (the name of torch's argument)
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, list[int], float]:
    return input, weight, bias, list(normalized_shape), eps


def _is_elementwise(options: Mapping[str, Any]) -> bool:
    """Whether a log loss is asked for each element, without weights."""
    others = (value for name, value in options.items() if name != "reduction")
    return options.get("reduction") == "none" and all(value is None for value in others)


def _stacked(count: int, dims: Sequence[int | None], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors with the replicas as their first dimension, as vmap gives them to a rule."""
    return [
        part if part is None else part.expand(count, *part.shape) if dim is None else part.movedim(dim, 0)
        for part, dim in zip(parts, dims, strict=False)
    ]
