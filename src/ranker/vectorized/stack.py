"""The layers of K replicas as one net: weights stacked along a leading dimension, the net's own code under vmap.

A rounding error of the first step is, some hundred steps later, as large as the difference between two seeds. So the
products here are those kernels whose result for each replica is that of ``torch.nn.functional.linear`` for this replica
alone, forward and backward: ``baddbmm`` adds the bias inside the product, which vmap's own rule does not. On the
processor that this was tested on, replicas of all models of this project are equal to runs alone to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from ranker.models import Ranker

_WIDE = 4  # outputs from which on a batched product is that of the single ones to the bit


class _Given(nn.Module):
    """Stands in for the embedding tables of a net: returns embeddings that were looked up before."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def pieces(self, _batch: object) -> list[Tensor]:
        return self.given

    def forward(self, _batch: object) -> Tensor:
        return torch.cat(self.given, dim=1)


@dataclass(frozen=True)
class _Rows:
    """The part of a batch that layers read, beside the embeddings."""

    dense_BF: Tensor


class StackedLayers:
    """All parameters of K replicas but their embedding tables.

    The parameters of the replicas' own nets become views of the stacks, so that the optimizer steps the replicas one
    tensor each, with the same kernels as alone, and a net can be evaluated at any time. With one replica the net runs
    without vmap, and its numbers are those of a run alone to the bit.

    Args:
        nets: the replicas, built from the same configuration.
    """

    def __init__(self, nets: Sequence[Ranker]) -> None:
        self.nets = list(nets)
        self._given = _Given()
        # The copy has no tables: deepcopy finds the stand-in where it looks for a copy of them.
        self._skeleton = copy.deepcopy(nets[0], {id(nets[0].embeddings): self._given})
        self._names = [name for name, _ in self._skeleton.named_parameters()]
        self._stacks: dict[str, Tensor] = {}
        self._bind()

    def forward(self, dense: Tensor, pieces: list[Tensor]) -> Tensor:
        """Logits [K, B, T].

        Args:
            dense: dense features, [B, F] for all replicas or [K, B, F].
            pieces: embeddings, each [K, B, width].
        """
        if len(self.nets) == 1:
            one = {name: stack[0] for name, stack in self._stacks.items()}
            return self._one(one, dense if dense.dim() == 2 else dense[0], [piece[0] for piece in pieces])[None]
        shared: Any = None if dense.dim() == 2 else 0
        with _AsAlone():
            logits: Tensor = vmap(self._one, in_dims=(0, shared, 0))(self._stacks, dense, pieces)
        return logits

    def leaves(self) -> list[Tensor]:
        """The stacks, whose gradient is wanted."""
        return list(self._stacks.values())

    def give_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Gives each replica's parameters their part of the gradients of ``leaves``; None where there is none."""
        for name, grad in zip(self._names, grads, strict=True):
            # The kernels of the optimizer need it contiguous, and vmap returns some transposed.
            parts = [None] * len(self.nets) if grad is None else grad.contiguous().unbind()
            for net, part in zip(self.nets, parts, strict=True):
                net.get_parameter(name).grad = part

    def keep(self, replicas: Sequence[int]) -> None:
        """Drops the other replicas, whose nets keep their weights."""
        for k, net in enumerate(self.nets):
            if k not in replicas:
                for name in self._names:
                    parameter = net.get_parameter(name)
                    parameter.data, parameter.grad = parameter.data.clone(), None
        self.nets = [self.nets[k] for k in replicas]
        self._bind()

    def _one(self, weights: dict[str, Tensor], dense_BF: Tensor, pieces: list[Tensor]) -> Tensor:
        self._given.given = pieces
        logits: Tensor = functional_call(self._skeleton, weights, (_Rows(dense_BF),))
        return logits

    def _bind(self) -> None:
        for name in self._names:
            stack = torch.stack([net.get_parameter(name).detach() for net in self.nets])
            for net, part in zip(self.nets, stack, strict=True):
                parameter = net.get_parameter(name)
                parameter.data, parameter.grad = part, None
            self._stacks[name] = stack.requires_grad_()


class _AsAlone(TorchFunctionMode):
    """Has linear layers and layer norm computed replica by replica to the bit, whatever module or function calls them.

    vmap's own rules are right up to rounding. They stay for everything else, where they give the same bits.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and args[0].dim() == 2:
            return _Linear.apply(*args, *[None] * (3 - len(args)))
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


def _stacked(count: int, dims: Sequence[int | None], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors with the replicas as their first dimension, as vmap gives them to a rule."""
    return [
        part if part is None else part.expand(count, *part.shape) if dim is None else part.movedim(dim, 0)
        for part, dim in zip(parts, dims, strict=False)
    ]
