"""Fully connected layers, and the initialisation that every dense layer of the models shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranker.errors import UserError


def dense_layer(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer that starts as a Keras ``Dense`` does.

        W ~ uniform(-a, a),  a = sqrt(6 / (in + out)),  b = 0

    The paper names no initialiser; its authors work in Keras, whose default this is. It matters here: it sets how
    large a first step is beside the weights, and so where naive Adagrad blows up.

    Source: Glorot and Bengio (2010), equation 16; Keras ``Dense(kernel_initializer="glorot_uniform")``.
    """
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def fused_linear(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Several layers on one input as one product, their outputs side by side.

    The layers stay parameters of their own, so that a method that treats each tensor by itself (one sigma a head)
    still can. All have a bias, or none has.
    """
    weight, bias = joined(layers)
    return F.linear(x, weight, bias)


def joined(layers: Iterable[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of several linear layers one below the other."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        weights.append(layer.weight)
        if layer.bias is not None:
            biases.append(layer.bias)
    return torch.cat(weights), torch.cat(biases) if biases else None


def checked_widths(name: str, widths: Sequence[int], *, allow_empty: bool = False) -> list[int]:
    """The widths as a list.

    Raises:
        UserError: no list of whole numbers of at least 1, or empty where it must not be.
    """
    if isinstance(widths, (str, int)) or not all(type(w) is int and w >= 1 for w in widths):
        raise UserError(f"model: {name} must be a list of layer widths of at least 1, such as [512, 512], got {widths}")
    if not widths and not allow_empty:
        raise UserError(f"model: {name} is empty; give at least one layer width, such as [512]")
    return list(widths)


def checked_count(name: str, value: int, *, at_least: int) -> int:
    """The value itself.

    Raises:
        UserError: no whole number, or below ``at_least``.
    """
    if type(value) is not int or value < at_least:
        raise UserError(f"model: {name} must be a whole number of at least {at_least}, got {value!r}")
    return value


class MLP(nn.Module):
    """Linear layers with ReLU between and after them.

        x_{l+1} = relu(bound(norm(W_l x_l + b_l)))

    where norm is layer normalisation or nothing, and bound(z) = min(max(z, -c), c) or nothing.

    Args:
        in_features: width of the input, [B, in_features].
        hidden: width of each layer; none gives the identity.
        layer_norm: normalise each layer's pre-activations.
        clip_activations: c, the bound on pre-activations; None leaves them alone. One of the ad-hoc mitigations that
            the paper lists; its gradient is 0 beyond the bound.

    Raises:
        UserError: a width below 1, or a bound not above 0.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        *,
        layer_norm: bool = False,
        clip_activations: float | None = None,
    ) -> None:
        super().__init__()
        hidden = checked_widths("hidden", hidden, allow_empty=True)
        if clip_activations is not None and not clip_activations > 0:
            raise UserError(f"model: clip_activations must be above 0, got {clip_activations}; null leaves it out")
        widths = [in_features, *hidden]
        self.output_width = widths[-1]
        self.clip_activations = clip_activations
        self.layers = nn.ModuleList(dense_layer(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in hidden) if layer_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_features] to [B, hidden[-1]]."""
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if self.norms is not None:
                x = self.norms[index](x)
            if self.clip_activations is not None:
                x = x.clamp(-self.clip_activations, self.clip_activations)
            # In place: no gradient asks for what is overwritten, and fresh memory costs more than the ReLU itself.
            x = F.relu(x, inplace=True)
        return x
