"""The base class of all rankers, and the heads that give one logit per task."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.models.embeddings import new_tables
from ranker.models.layers import MLP, dense_layer, fused_linear, joined


class Ranker(nn.Module, ABC):
    """Base class of the models: input features and parameter counts. A model adds layers, ``forward``, ``layer_names``.

    The names of all embedding parameters, and of no others, start with ``embeddings.``. Optimizers use this to
    distinguish the two groups.

    Args:
        schema: the features to read and the tasks to predict.
        sparse_embeddings: use sparse gradients for the embedding tables.

    Attributes:
        task_names: tasks, in the order of the logits.
        input_width: D, dense features plus all embeddings.
        embeddings: the embedding tables.
        task_number: regular expression for names of parameters of one task each; its group is the number of the task.
            Empty where only heads, which are named by their task, belong to one.
    """

    task_number: ClassVar[str] = ""

    def __init__(self, schema: Schema, *, sparse_embeddings: bool = False) -> None:
        super().__init__()
        self.task_names = schema.task_names
        self.embeddings = new_tables(schema, sparse=sparse_embeddings)
        self.input_width = len(schema.dense) + self.embeddings.output_width

    def features(self, batch: Batch) -> Tensor:
        """The input x_BD: dense features as in the batch, then embeddings, both in the schema's order."""
        return torch.cat([batch.dense_BF, *self.embeddings.pieces(batch)], dim=1)

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Logits_BT of a batch: log odds for a binary task, the predicted transformed label for a regression."""

    @abstractmethod
    def layer_names(self) -> dict[str, str]:
        """Module names of the layers that diagnostics watch, from the input to the output.

        Returns:
            By role: ``dcn`` (first cross layer, only if there is one), ``bottom_first`` and ``bottom_top`` (first and
            last shared layer, of the first shared expert if there are experts) and ``head/<task>``. The name of the
            parameter is the module name + ``.weight`` (for ``dcn`` any parameter below it).
        """

    def head_names(self) -> dict[str, str]:
        """Module names of the heads, by ``head/<task>``."""
        return {f"head/{task}": f"heads.linear.{head_key(task)}" for task in self.task_names}

    def input_axes(self) -> Mapping[str, tuple[int, ...]]:
        """Axes that run over the input x_BD, by name of the parameter; ``warm_start`` moves their columns by feature.

        The default is empty: where features change, tensors of another shape then start fresh.
        """
        return {}

    @torch.no_grad()
    def set_head_biases(self, logits_T: Tensor) -> None:
        """Sets the bias of each head, so that the untrained model starts near these logits.

        Args:
            logits_T: one logit per task, in the order of the tasks.
        """
        for module, value in zip(self.head_names().values(), logits_T.tolist(), strict=True):
            self.get_parameter(f"{module}.bias").fill_(value)

    def count_parameters(self) -> dict[str, int]:
        """Numbers of parameters: ``embedding``, and ``dense`` for all others, which the paper's Table 1 counts."""
        local = sum(p.numel() for p in self.embeddings.parameters())
        return {"embedding": self.embeddings.count(), "dense": sum(p.numel() for p in self.parameters()) - local}


class Heads(nn.Module):
    """Per task, an optional tower and a linear layer.

        logit_t = w_t . tower_t(h_t) + b_t

    Each head is a separate module and tensor, named by its task. Per-tensor methods therefore have one sigma per head,
    as in Figure 6 of the paper.

    Args:
        task_names: names, in the order of the logits.
        in_features: H, width of the representation.
        tower: widths of each task's own hidden layers. Empty for a linear head.
        layer_norm: as in ``MLP``.
        clip_activations: as in ``MLP``.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        in_features: int,
        *,
        tower: Sequence[int] = (),
        layer_norm: bool = False,
        clip_activations: float | None = None,
    ) -> None:
        super().__init__()
        self.keys = [head_key(name) for name in task_names]
        self.towers = None
        width = in_features
        if tower:
            towers = {
                key: MLP(in_features, tower, layer_norm=layer_norm, clip_activations=clip_activations)
                for key in self.keys
            }
            self.towers = nn.ModuleDict(towers)
            width = tower[-1]
        self.linear = nn.ModuleDict({key: dense_layer(width, 1) for key in self.keys})

    def forward(self, h: Tensor) -> Tensor:
        """Logits.

        Args:
            h: [B, H] if the tasks share a representation, [B, T, H] if each task has its own.

        Returns:
            logits_BT, in the order of the tasks.
        """
        layers = [self.linear[key] for key in self.keys]
        if self.towers is not None:
            h = torch.stack(
                [self.towers[key](h if h.dim() == 2 else h[:, t]) for t, key in enumerate(self.keys)], dim=1
            )
        if h.dim() == 2:
            return fused_linear(layers, h)
        weight_TH, bias_T = joined(layers)
        assert bias_T is not None
        return (h * weight_TH).sum(-1) + bias_T

    def of_mixtures(self, weights_BTE: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Logits of tasks that each read their own mixture of the same E outputs.

            h_t = sum_e a_te * o_e;   logit_t = w_t . h_t + b_t = sum_e a_te * (w_t . o_e) + b_t

        A head without a tower is linear, so it is applied before the mixture: E products with a matrix of T rows. The
        tensor [B, T, H], T times as large as an expert's output, is never created. Equal up to rounding.

        Args:
            weights_BTE: a, the weight of each output for each task.
            outputs: o, E representations [B, H].

        Returns:
            logits_BT, in the order of the tasks.
        """
        if self.towers is not None:
            return self(weights_BTE @ torch.stack(list(outputs), dim=1))
        weight_TH, bias_T = joined(self.linear[key] for key in self.keys)
        assert bias_T is not None
        scores_BTE = torch.stack([F.linear(o_BH, weight_TH) for o_BH in outputs], dim=-1)
        return (weights_BTE * scores_BTE).sum(-1) + bias_T


def head_key(task_name: str) -> str:
    """Module name of a task's head. The prefix avoids clashes of a task such as 'train' with Module's attributes.

    Exported programs take letters, digits and ``_`` in names. ``add-to-cart`` becomes ``task_add__2d__to__2d__cart``.
    """
    return "task_" + re.sub(r"\W", lambda character: f"__{ord(character[0]):x}__", task_name)
