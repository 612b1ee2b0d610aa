"""Layers of the models: dense layers and their initialisation, the MLP, and the cross layers of DCN-V2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranker.errors import UserError

CROSS_INIT_STD = 0.05


def dense_layer(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer with the initialisation of a Keras ``Dense``.

        W ~ uniform(-a, a),  a = sqrt(6 / (in + out)),  b = 0

    The paper names no initialiser. Its authors work in Keras, and this is the default there. The initialisation matters
    here: it determines the size of a first step relative to the weights, and so where naive Adagrad diverges.

    Source: Glorot and Bengio (2010), equation 16; Keras ``Dense(kernel_initializer="glorot_uniform")``.
    """
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def fused_linear(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Applies several linear layers to one input as one product. Returns their outputs side by side.

    The layers stay separate parameters, so that per-tensor methods still have one sigma per head. Either all layers
    have a bias, or none.
    """
    weight, bias = joined(layers)
    return F.linear(x, weight, bias)


def joined(layers: Iterable[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Concatenated weights and biases of several linear layers."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        weights.append(layer.weight)
        if layer.bias is not None:
            biases.append(layer.bias)
    return torch.cat(weights), torch.cat(biases) if biases else None


def checked_widths(name: str, widths: Sequence[int], *, allow_empty: bool = False) -> list[int]:
    """Returns the widths as a list.

    Raises:
        UserError: not a list of integers of at least 1, or empty although ``allow_empty`` is False.
    """
    if isinstance(widths, (str, int)) or not all(type(w) is int and w >= 1 for w in widths):
        raise UserError(f"model: {name} must be a list of layer widths of at least 1, such as [512, 512], got {widths}")
    if not widths and not allow_empty:
        raise UserError(f"model: {name} is empty; give at least one layer width, such as [512]")
    return list(widths)


def checked_count(name: str, value: int, *, at_least: int) -> int:
    """Returns the value.

    Raises:
        UserError: not an integer, or below ``at_least``.
    """
    if type(value) is not int or value < at_least:
        raise UserError(f"model: {name} must be a whole number of at least {at_least}, got {value!r}")
    return value


class MLP(nn.Module):
    """Linear layers, each followed by a ReLU.

        x_{l+1} = relu(bound(norm(W_l x_l + b_l)))

    where norm is layer normalisation or nothing, and bound(z) = min(max(z, -c), c) or nothing.

    Args:
        in_features: width of the input, [B, in_features].
        hidden: width of each layer. An empty list gives the identity.
        layer_norm: normalise each layer's pre-activations.
        clip_activations: c, the bound on pre-activations. None for no bound. This is one of the ad-hoc mitigations in
            the paper. Its gradient is 0 beyond the bound.

    Raises:
        UserError: a width is below 1, or the bound is not above 0.
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
            raise UserError(f"model: clip_activations must be above 0, got {clip_activations}; null for no bound")
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
            # In place: the backward pass does not need the overwritten values, and new memory costs more than the ReLU.
            x = F.relu(x, inplace=True)
        return x


class CrossLayer(nn.Module):
    """One cross layer on inputs of width D.

        full rank   x_{l+1} = x_0 * (W x_l + b) + x_l             W [D, D]
        low rank    x_{l+1} = x_0 * (U V^T x_l + b) + x_l         U, V [D, r]

    The bias is inside the product. W (or V and U) is drawn from a normal distribution with standard deviation 0.05,
    truncated at two standard deviations, and b is 0, as in the authors' TensorFlow Recommenders.

    Args:
        width: D.
        rank: r. None for full rank.

    Source: Wang et al. (2021), DCN V2, equations 1 and 2; initialisation from
        ``tensorflow_recommenders.layers.dcn.Cross``.
    """

    def __init__(self, width: int, *, rank: int | None = None) -> None:
        super().__init__()
        self.down = None if rank is None else nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(width if rank is None else rank, width)
        for layer in (self.down, self.up):
            if layer is not None:
                bound = 2 * CROSS_INIT_STD
                nn.init.trunc_normal_(layer.weight, std=CROSS_INIT_STD, a=-bound, b=bound)
        nn.init.zeros_(self.up.bias)

    def forward(self, x0_BD: Tensor, x_BD: Tensor) -> Tensor:
        """The next layer's x, [B, D]."""
        projected = x_BD if self.down is None else self.down(x_BD)
        return torch.addcmul(x_BD, x0_BD, self.up(projected))


class CrossNet(nn.Module):
    """Stacked cross layers, each multiplying by the same x_0, then layer normalisation.

    Args:
        width: D, width of the input and of the output.
        layers: number of layers, at least 1.
        rank: rank of each layer's matrix, at most D. None for full rank.
        layer_norm: normalise the output, as in the paper. Products grow with every layer, and without normalisation
            the layers above get inputs of any size.

    Raises:
        UserError: layers or rank is below 1.

    Source: Wang et al. (2021), DCN V2, the stacked structure; Tang et al. (2023), Table 1 (Large+DCN).
    """

    def __init__(self, width: int, *, layers: int, rank: int | None = None, layer_norm: bool = True) -> None:
        super().__init__()
        checked_count("cross_layers", layers, at_least=1)
        if rank is not None:
            checked_count("cross_rank", rank, at_least=1)
        self.layers = nn.ModuleList(CrossLayer(width, rank=rank) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if layer_norm else None

    def forward(self, x0_BD: Tensor) -> Tensor:
        """Maps [B, D] to [B, D]."""
        x_BD = x0_BD
        for layer in self.layers:
            x_BD = layer(x0_BD, x_BD)
        return x_BD if self.norm is None else self.norm(x_BD)
