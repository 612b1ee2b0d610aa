"""Shared bottom (hard parameter sharing) with optional cross layers: the paper's Small, Large and Large+DCN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.models.layers import MLP, CrossNet, checked_count, checked_widths
from ranker.models.ranker_base import Heads, Ranker


class SharedBottom(Ranker):
    """Input, optional cross layers, shared layers, one head per task.

        x = [dense, embeddings];  c = norm(cross(x)) or x;  h = mlp(c);  logit_t = head_t(h)

    Args:
        schema: features and tasks.
        hidden: widths of the shared layers.
        cross_layers: number of DCN-V2 layers on the input. 0 for none.
        cross_rank: rank of their matrices. None for full rank.
        cross_layer_norm: layer normalisation between cross and shared layers.
        tower: widths of each task's own hidden layers.
        layer_norm: layer normalisation in the shared layers and towers.
        clip_activations: bound on pre-activations there. None for no bound.
        sparse_embeddings: use sparse gradients for the embedding tables.

    Raises:
        UserError: a width, count or bound is out of range.

    Source: Tang et al. (2023), Table 1.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        hidden: Sequence[int],
        cross_layers: int = 0,
        cross_rank: int | None = None,
        cross_layer_norm: bool = True,
        tower: Sequence[int] = (),
        layer_norm: bool = False,
        clip_activations: float | None = None,
        sparse_embeddings: bool = False,
    ) -> None:
        hidden = checked_widths("hidden", hidden)
        tower = checked_widths("tower", tower, allow_empty=True)
        checked_count("cross_layers", cross_layers, at_least=0)
        if cross_rank is not None and not cross_layers:
            raise UserError(f"model: cross_rank {cross_rank} has no effect without cross layers; set cross_layers too")
        super().__init__(schema, sparse_embeddings=sparse_embeddings)
        self.cross, self.low_rank = None, cross_rank is not None
        if cross_layers:
            self.cross = CrossNet(self.input_width, layers=cross_layers, rank=cross_rank, layer_norm=cross_layer_norm)
        self.bottom = MLP(self.input_width, hidden, layer_norm=layer_norm, clip_activations=clip_activations)
        self.heads = Heads(
            self.task_names, hidden[-1], tower=tower, layer_norm=layer_norm, clip_activations=clip_activations
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits_BT."""
        x_BD = self.features(batch)
        if self.cross is not None:
            x_BD = self.cross(x_BD)
        return self.heads(self.bottom(x_BD))

    def input_axes(self) -> Mapping[str, tuple[int, ...]]:
        """As in ``Ranker``: the first shared layer, and both sides of the cross layers."""
        axes: dict[str, tuple[int, ...]] = {"bottom.layers.0.weight": (1,)}
        for name, parameter in self.named_parameters():
            if name.startswith("cross."):
                axes[name] = (1,) if ".down." in name else (0,) if parameter.ndim == 1 or self.low_rank else (0, 1)
        return axes

    def layer_names(self) -> dict[str, str]:
        """As in ``Ranker``."""
        names = {} if self.cross is None else {"dcn": "cross.layers.0"}
        names["bottom_first"] = "bottom.layers.0"
        names["bottom_top"] = f"bottom.layers.{len(self.bottom.layers) - 1}"
        return names | self.head_names()
