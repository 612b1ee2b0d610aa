"""What turns a representation into one logit a task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranker.models.mlp import MLP, dense_layer, fused_linear, joined


class Heads(nn.Module):
    """A tower (maybe none) and a linear layer a task.

        logit_t = w_t . tower_t(h_t) + b_t

    Each head is a module and a tensor of its own, named by its task: methods that treat tensors one by one give each
    head its own sigma, as in Figure 6 of the paper.

    Args:
        task_names: names, in the order of the logits.
        in_features: H, width of the representation.
        tower: widths of each task's own hidden layers; none for a linear head.
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
            h: [B, H] where the tasks share a representation, [B, T, H] where each has its own.

        Returns:
            logits_BT, the tasks in order.
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
        """Logits of tasks that each read a mixture of its own of the same E outputs.

            h_t = sum_e a_te * o_e;   logit_t = w_t . h_t + b_t = sum_e a_te * (w_t . o_e) + b_t

        A head without a tower is linear, so it may come before the mixture: E products with a matrix of T rows, and
        [B, T, H], T times as large as an expert's output, never exists. Equal up to rounding.

        Args:
            weights_BTE: a, what each task takes from each output.
            outputs: o, E representations [B, H].

        Returns:
            logits_BT, the tasks in order.
        """
        if self.towers is not None:
            return self(weights_BTE @ torch.stack(list(outputs), dim=1))
        weight_TH, bias_T = joined(self.linear[key] for key in self.keys)
        assert bias_T is not None
        scores_BTE = torch.stack([F.linear(o_BH, weight_TH) for o_BH in outputs], dim=-1)
        return (weights_BTE * scores_BTE).sum(-1) + bias_T


def head_key(task_name: str) -> str:
    """Module name of a task's head. The prefix keeps a task called 'keys' or 'train' off Module's own attributes."""
    return f"task_{task_name}"
