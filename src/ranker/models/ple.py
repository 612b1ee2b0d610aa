"""Progressive layered extraction: shared experts and experts of each task's own, in several levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.models.base import Ranker
from ranker.models.heads import Heads, head_key
from ranker.models.mlp import MLP, checked_count, checked_widths, dense_layer


class _Experts(nn.ModuleList):
    """Experts that read the same stream."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [expert(x) for expert in self]


class ExtractionLayer(nn.Module):
    """One level: experts read their own stream, gates mix what a stream may see.

        e_t,k = expert_t,k(x_t),  e_s,k = expert_s,k(x_s)
        y_t = sum over own and shared experts of softmax(G_t x_t)
        y_s = sum over all experts of softmax(G_s x_s)           (not on the last level)

    Args:
        in_features: width of every stream.
        tasks: T.
        shared_experts: experts of the shared stream, at least 1.
        task_experts: experts of each task's stream; 0 makes the level an MMoE.
        hidden: widths of an expert's layers.
        last: leave out the shared stream's gate, which nothing would read.
        layer_norm: as in ``MLP``.
        clip_activations: as in ``MLP``.

    Source: Tang et al. (2020), Progressive Layered Extraction.
    """

    def __init__(
        self,
        in_features: int,
        *,
        tasks: int,
        shared_experts: int,
        task_experts: int,
        hidden: Sequence[int],
        last: bool,
        layer_norm: bool,
        clip_activations: float | None,
    ) -> None:
        super().__init__()

        def experts(count: int) -> _Experts:
            return _Experts(
                MLP(in_features, hidden, layer_norm=layer_norm, clip_activations=clip_activations) for _ in range(count)
            )

        self.shared = experts(shared_experts)
        self.own = nn.ModuleList(experts(task_experts) for _ in range(tasks))
        seen = shared_experts + task_experts
        self.gates = nn.ModuleList(dense_layer(in_features, seen, bias=False) for _ in range(tasks))
        everything = shared_experts + tasks * task_experts
        self.shared_gate = None if last else dense_layer(in_features, everything, bias=False)

    def forward(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Maps the T task streams and the shared one, each [B, D], to streams [B, H]; the last level gives T alone."""
        *tasks, shared = streams
        shared_out = self.shared(shared)
        own_out = [group(x) for x, group in zip(tasks, self.own, strict=True)]
        mixed = [_mix(gate(x), [*shared_out, *own]) for x, gate, own in zip(tasks, self.gates, own_out, strict=True)]
        if self.shared_gate is not None:
            mixed.append(_mix(self.shared_gate(shared), [*shared_out, *(out for own in own_out for out in own)]))
        return mixed


def _mix(gate_BE: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Mean of the E outputs [B, H], weighted by the softmax of the gate's logits."""
    weights_BE = gate_BE.softmax(-1)
    return (weights_BE.unsqueeze(1) @ torch.stack(list(outputs), dim=1)).squeeze(1)


class PLE(Ranker):
    """Extraction layers, then a head a task.

    All streams of the first level are the input. One level with no task experts is MMoE.

    Args:
        schema: features and tasks.
        levels: number of extraction layers.
        shared_experts: shared experts a level.
        task_experts: experts of its own that each task has a level.
        expert_hidden: widths of an expert's layers.
        tower: widths of each task's own hidden layers.
        layer_norm: layer normalisation in experts and towers.
        clip_activations: bound on pre-activations there; None for none.
        sparse_embeddings: sparse gradients for the embedding tables.

    Raises:
        UserError: a width, count or bound that makes no model.

    Source: Tang et al. (2020), Progressive Layered Extraction (PLE).
    """

    def __init__(
        self,
        schema: Schema,
        *,
        levels: int,
        shared_experts: int,
        task_experts: int,
        expert_hidden: Sequence[int],
        tower: Sequence[int] = (),
        layer_norm: bool = False,
        clip_activations: float | None = None,
        sparse_embeddings: bool = False,
    ) -> None:
        checked_count("levels", levels, at_least=1)
        checked_count("shared_experts", shared_experts, at_least=1)
        checked_count("task_experts", task_experts, at_least=0)
        expert_hidden = checked_widths("expert_hidden", expert_hidden)
        tower = checked_widths("tower", tower, allow_empty=True)
        super().__init__(schema, sparse_embeddings=sparse_embeddings)
        self.levels = nn.ModuleList(
            ExtractionLayer(
                self.input_width if level == 0 else expert_hidden[-1],
                tasks=len(self.task_names),
                shared_experts=shared_experts,
                task_experts=task_experts,
                hidden=expert_hidden,
                last=level == levels - 1,
                layer_norm=layer_norm,
                clip_activations=clip_activations,
            )
            for level in range(levels)
        )
        self.expert_depth = len(expert_hidden)
        self.heads = Heads(
            self.task_names, expert_hidden[-1], tower=tower, layer_norm=layer_norm, clip_activations=clip_activations
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits_BT."""
        x_BD = self.features(batch)
        streams = [x_BD] * (len(self.task_names) + 1)
        for level in self.levels:
            streams = level(streams)
        return self.heads(torch.stack(streams, dim=1))

    def layer_names(self) -> dict[str, str]:
        """As in ``Ranker``."""
        names = {
            "bottom_first": "levels.0.shared.0.layers.0",
            "bottom_top": f"levels.{len(self.levels) - 1}.shared.0.layers.{self.expert_depth - 1}",
        }
        return names | {f"head/{task}": f"heads.linear.{head_key(task)}" for task in self.task_names}
