"""What moves before the loss does: norms by layer, and how the tasks pull on the layers they share.

Everything stays on the device; nothing here waits for it until a value is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ranker.stability.activations import infinity_norm
from ranker.stability.optimizer_state import adagrad_denominator, group_by_parameter


class LayerSigns(NamedTuple):
    """Numbers of one parameter tensor between ``backward()`` and ``step()``; scalars on its device.

    Attributes:
        grad_norm: norm2(g).
        grad_over_weight: norm2(g) / norm2(w), which AGC bounds.
        update_max: infinity norm of r = g / (sqrt(G + g^2) + eps), which Clippy bounds; nan for an optimizer without an
            Adagrad accumulator. For other optimizers' own r see their reports.
    """

    grad_norm: Tensor
    grad_over_weight: Tensor
    update_max: Tensor


class TaskGradients(NamedTuple):
    """How each task pulls on shared parameters.

    Attributes:
        norm_T: norm2 of each task's weighted gradient.
        cosine_TT: cosine between the gradients of two tasks; below 0 they pull apart; nan where one is 0.
    """

    norm_T: Tensor
    cosine_TT: Tensor


@torch.no_grad()
def layer_signs(
    named_parameters: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, LayerSigns]:
    """Signs of each parameter that has a dense gradient, by name.

    Call it after ``backward()`` and before ``step()``.

    Args:
        named_parameters: which ones; a few layers tell as much as all (``Ranker.layer_names``).
        optimizer: whose ``state[p]["sum"]`` is the accumulator before this step, if it keeps one.

    Source: Tang et al. (2023), Figure 4.
    """
    groups = group_by_parameter(optimizer) if optimizer else {}
    signs = {}
    for name, p in named_parameters:
        g = p.grad
        if g is None or g.is_sparse:
            continue
        grad_norm = torch.linalg.vector_norm(g)
        state = optimizer.state.get(p, {}) if optimizer else {}
        denominator = adagrad_denominator(state, groups.get(id(p), {}), g)
        update_max = grad_norm.new_full((), torch.nan)
        if denominator is not None:
            update_max = infinity_norm(torch.div(g, denominator, out=denominator))
        signs[name] = LayerSigns(grad_norm, grad_norm / torch.linalg.vector_norm(p), update_max)
    return signs


def task_gradients(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> TaskGradients:
    """Norms and cosines of the tasks' gradients on shared parameters.

    One backward pass a task, only as deep as the parameters lie: for the top shared layer alone that is little. The
    graph is kept and ``.grad`` is not touched, so the step's own backward pass can follow; and neither are the hooks by
    which DDP averages gradients. Where there are several ranks the gradients are averaged here, in one all-reduce:
    every rank must call.

    Args:
        losses: one scalar a task, weighted as in training, with their graph.
        parameters: shared ones, such as the weight of the top shared layer.
    """
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)]
            )
        )
    stacked = torch.stack(rows)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    norm_T = torch.linalg.vector_norm(stacked, dim=1)
    unit = stacked / norm_T[:, None]
    return TaskGradients(norm_T=norm_T, cosine_TT=unit @ unit.T)
