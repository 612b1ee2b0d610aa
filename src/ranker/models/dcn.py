"""DCN-V2 cross layers: explicit products of input features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranker.models.mlp import checked_count

CROSS_INIT_STD = 0.05


class CrossLayer(nn.Module):
    """One cross layer on inputs of width D.

        full rank   x_{l+1} = x_0 * (W x_l + b) + x_l             W [D, D]
        low rank    x_{l+1} = x_0 * (U V^T x_l + b) + x_l         U, V [D, r]

    The bias is inside the product. W (or V and U) starts as a normal of standard deviation 0.05 cut off at two
    deviations, and b at 0, as in the authors' TensorFlow Recommenders.

    Args:
        width: D.
        rank: r; None for full rank.

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
    """Cross layers one after another, each multiplying by the same x_0; then layer normalisation.

    Args:
        width: D, width of the input and of the output.
        layers: how many, at least 1.
        rank: rank of each layer's matrix, at most D; None for full rank.
        layer_norm: normalise the output, as in the paper. Products grow with every layer; without it the layers above
            see inputs of any size.

    Raises:
        UserError: layers or rank below 1.

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
