"""PLE (progressive layered extraction): shared and task-specific experts in several levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.models.layers import MLP, checked_count, checked_widths, dense_layer
from ranker.models.ranker_base import Heads, Ranker


class _Experts(nn.ModuleList):
    """Experts with the same input stream."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [expert(x) for expert in self]


class ExtractionLayer(nn.Module):
    """One level: experts read their own stream, and gates mix the experts that a stream may use.

        e_t,k = expert_t,k(x_t),  e_s,k = expert_s,k(x_s)
        y_t = sum over own and shared experts of softmax(G_t x_t)
        y_s = sum over all experts of softmax(G_s x_s)           (not on the last level)

    Args:
        in_features: width of every stream.
        tasks: T.
        shared_experts: experts of the shared stream, at least 1.
        task_experts: experts of each task's stream. With 0 the level is an MMoE.
        hidden: widths of an expert's layers.
        last: omit the shared stream's gate, whose output would not be used.
        layer_norm: as in ``MLP``.
        clip_activations: as in ``MLP``.

    Source: Tang et al. (2020), Progressive Layered Extraction.
    """

    seen_by_task: Tensor

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
        own_at = shared_experts + torch.arange(tasks * task_experts).view(tasks, task_experts)
        seen_by_task = torch.cat([torch.arange(shared_experts).expand(tasks, -1), own_at], dim=1)
        self.register_buffer("seen_by_task", seen_by_task, persistent=False)
        self.shared_gate = None if last else dense_layer(in_features, everything, bias=False)

    def forward(self, streams: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Outputs of the level's experts, and their weights in the next streams.

        Args:
            streams: T task streams, then the shared stream, each [B, D].

        Returns:
            Weights of the experts in the next streams, [B, T + 1, E] ([B, T, E] from the last level), and the outputs
            of all experts, E times [B, H].
        """
        *tasks, shared = streams
        outputs = self.shared(shared)
        for x, group in zip(tasks, self.own, strict=True):
            outputs += group(x)
        weights_BTE = self._task_weights(tasks, len(outputs))
        if self.shared_gate is not None:
            shared_weights_BE = self.shared_gate(shared).softmax(-1)
            weights_BTE = torch.cat([weights_BTE, shared_weights_BE.unsqueeze(1)], dim=1)
        return weights_BTE, outputs

    def _task_weights(self, tasks: Sequence[Tensor], experts: int) -> Tensor:
        """The weight of each expert for each task, [B, T, E]. 0 for experts of other tasks."""
        logits = [gate(x) for x, gate in zip(tasks, self.gates, strict=True)]
        seen = torch.stack(logits, dim=1).softmax(-1)
        weights_BTE = seen.new_zeros(seen.shape[0], len(tasks), experts)
        return weights_BTE.scatter(2, self.seen_by_task.expand(seen.shape[0], -1, -1), seen)


class PLE(Ranker):
    """Extraction layers, then one head per task.

    All streams of the first level are the input. One level without task experts is MMoE.

    Args:
        schema: features and tasks.
        levels: number of extraction layers.
        shared_experts: shared experts per level.
        task_experts: task-specific experts per task and level.
        expert_hidden: widths of an expert's layers.
        tower: widths of each task's own hidden layers.
        layer_norm: layer normalisation in experts and towers.
        clip_activations: bound on pre-activations there. None for no bound.
        sparse_embeddings: use sparse gradients for the embedding tables.

    Raises:
        UserError: a width, count or bound is out of range.

    Source: Tang et al. (2020), Progressive Layered Extraction (PLE).
    """

    task_number = r"^levels\.\d+\.(?:own|gates)\.(\d+)\."

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
        streams: Sequence[Tensor] = [x_BD] * (len(self.task_names) + 1)
        *lower, last = self.levels
        for level in lower:
            weights_BTE, outputs = level(streams)
            streams = (weights_BTE @ torch.stack(outputs, dim=1)).unbind(1)
        return self.heads.of_mixtures(*last(streams))

    def input_axes(self) -> Mapping[str, tuple[int, ...]]:
        """As in ``Ranker``: the first layer of each expert of the first level, and its gates."""
        first = self.levels[0]
        return {
            f"levels.0.{name}": (1,)
            for name, parameter in first.named_parameters()
            if parameter.ndim == 2 and ("gate" in name or name.endswith(".layers.0.weight"))
        }

    def layer_names(self) -> dict[str, str]:
        """As in ``Ranker``."""
        names = {
            "bottom_first": "levels.0.shared.0.layers.0",
            "bottom_top": f"levels.{len(self.levels) - 1}.shared.0.layers.{self.expert_depth - 1}",
        }
        return names | self.head_names()
