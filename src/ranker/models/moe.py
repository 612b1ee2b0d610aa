"""MMoE: experts that all tasks share, mixed by one gate per task (soft parameter sharing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.models.layers import MLP, checked_count, checked_widths, dense_layer, fused_linear
from ranker.models.ranker_base import Heads, Ranker


class MMoE(Ranker):
    """Multi-gate mixture of experts.

        g_t = softmax(G_t x)                 [E], one gate per task, no bias
        h_t = sum_e g_t,e * expert_e(x)      [H]
        logit_t = head_t(h_t)

    With one expert this is a shared bottom.

    Args:
        schema: features and tasks.
        experts: E, number of experts, each an MLP on the input.
        expert_hidden: widths of an expert's layers.
        tower: widths of each task's own hidden layers.
        layer_norm: layer normalisation in experts and towers.
        clip_activations: bound on pre-activations there. None for no bound.
        sparse_embeddings: use sparse gradients for the embedding tables.

    Raises:
        UserError: a width, count or bound is out of range.

    Source: Ma et al. (2018), Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts.
    """

    task_number = r"^gates\.(\d+)\."

    def __init__(
        self,
        schema: Schema,
        *,
        experts: int,
        expert_hidden: Sequence[int],
        tower: Sequence[int] = (),
        layer_norm: bool = False,
        clip_activations: float | None = None,
        sparse_embeddings: bool = False,
    ) -> None:
        checked_count("experts", experts, at_least=1)
        expert_hidden = checked_widths("expert_hidden", expert_hidden)
        tower = checked_widths("tower", tower, allow_empty=True)
        super().__init__(schema, sparse_embeddings=sparse_embeddings)
        self.expert_depth = len(expert_hidden)
        self.experts = nn.ModuleList(
            MLP(self.input_width, expert_hidden, layer_norm=layer_norm, clip_activations=clip_activations)
            for _ in range(experts)
        )
        self.gates = nn.ModuleList(dense_layer(self.input_width, experts, bias=False) for _ in self.task_names)
        self.heads = Heads(
            self.task_names, expert_hidden[-1], tower=tower, layer_norm=layer_norm, clip_activations=clip_activations
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits_BT."""
        x_BD = self.features(batch)
        return self.heads.of_mixtures(self.gate(x_BD), [expert(x_BD) for expert in self.experts])

    def gate(self, x_BD: Tensor) -> Tensor:
        """The weight of each expert for each task, [B, T, E]. The sum over the experts is 1."""
        logits = fused_linear(self.gates, x_BD)
        return logits.view(x_BD.shape[0], len(self.task_names), len(self.experts)).softmax(-1)

    def input_axes(self) -> Mapping[str, tuple[int, ...]]:
        """As in ``Ranker``: the first layer of each expert, and the gates."""
        firsts = {f"experts.{number}.layers.0.weight": (1,) for number in range(len(self.experts))}
        return firsts | {f"gates.{number}.weight": (1,) for number in range(len(self.gates))}

    def layer_names(self) -> dict[str, str]:
        """As in ``Ranker``."""
        names = {"bottom_first": "experts.0.layers.0", "bottom_top": f"experts.0.layers.{self.expert_depth - 1}"}
        return names | self.head_names()
