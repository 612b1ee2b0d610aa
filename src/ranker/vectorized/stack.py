"""The layers of K replicas as one net: weights stacked along a leading dimension, the net's own code under vmap."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ranker.models import Ranker
from ranker.vectorized.kernels import AsAlone


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
        self._given = _Given()
        # The copy has no tables: deepcopy finds the stand-in where it looks for a copy of them.
        self._skeleton = copy.deepcopy(nets[0], {id(nets[0].embeddings): self._given})
        self._names = [name for name, _ in self._skeleton.named_parameters()]
        self._own = [[net.get_parameter(name) for name in self._names] for net in nets]  # by replica
        self._stacks: dict[str, Tensor] = {}
        self._bind()

    def forward(self, dense: Tensor, pieces: list[Tensor]) -> Tensor:
        """Logits [K, B, T].

        Args:
            dense: dense features, [B, F] for all replicas or [K, B, F].
            pieces: embeddings, each [K, B, width].
        """
        if len(self._own) == 1:
            one = {name: stack[0] for name, stack in self._stacks.items()}
            return self._one(one, dense if dense.dim() == 2 else dense[0], [piece[0] for piece in pieces])[None]
        shared: Any = None if dense.dim() == 2 else 0
        with AsAlone():
            logits: Tensor = vmap(self._one, in_dims=(0, shared, 0))(self._stacks, dense, pieces)
        return logits

    def leaves(self) -> list[Tensor]:
        """The stacks, whose gradient is wanted."""
        return list(self._stacks.values())

    def give_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Gives each replica's parameters their part of the gradients of ``leaves``; None where there is none."""
        for own, grad in zip(zip(*self._own, strict=True), grads, strict=True):
            # The kernels of the optimizer need it contiguous, and vmap returns some transposed.
            parts = [None] * len(own) if grad is None else grad.contiguous().unbind()
            for parameter, part in zip(own, parts, strict=True):
                parameter.grad = part

    def keep(self, replicas: Sequence[int]) -> None:
        """Drops the other replicas, whose nets keep their weights."""
        for k, own in enumerate(self._own):
            if k not in replicas:
                for parameter in own:
                    parameter.data, parameter.grad = parameter.data.clone(), None
        self._own = [self._own[k] for k in replicas]
        self._bind()

    def _one(self, weights: dict[str, Tensor], dense_BF: Tensor, pieces: list[Tensor]) -> Tensor:
        self._given.given = pieces
        logits: Tensor = functional_call(self._skeleton, weights, (_Rows(dense_BF),))
        return logits

    def _bind(self) -> None:
        for name, own in zip(self._names, zip(*self._own, strict=True), strict=True):
            stack = torch.stack([parameter.detach() for parameter in own])
            for parameter, part in zip(own, stack, strict=True):
                parameter.data, parameter.grad = part, None
            self._stacks[name] = stack.requires_grad_()
