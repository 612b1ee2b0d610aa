"""What an optimizer multiplies a gradient by, as a diagonal: the P in whose terms its edge of stability is 2 / lr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """A step of an optimizer, written as w <- w - lr P grad(w).

    Attributes:
        parameters: those that the step moves; one whose learning rate or sigma is 0 stands still and is left out.
        diagonals: of P, by parameter.
        lr: learning rate that P is relative to, per step.
        kind: whose P it is: ``adagrad``, ``adam``, ``gradient descent``, or several joined by a plus.
    """

    parameters: list[Tensor]
    diagonals: list[Tensor]
    lr: float
    kind: str

    @property
    def is_identity(self) -> bool:
        """Whether P is 1, so that the Hessian itself decides."""
        return self.kind == "gradient descent" and all(bool((d == 1).all()) for d in self.diagonals)


@torch.no_grad()
def step_preconditioner(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], *, sigma: Mapping[Tensor, float] | None = None
) -> Preconditioner:
    """P of the step to come, from the optimizer's state after a step.

        adagrad            sigma / (sqrt(G) + eps)                               state ``sum``
        adam               sigma / (sqrt(v / (1 - beta2^t)) + eps) * (1 - beta1) / (1 + beta1)   ``exp_avg_sq``
        gradient descent   sigma, over 1 + momentum, times 1 + 2 momentum with Nesterov's; any other state

    each times the group's learning rate over that of the first group. The last factor of Adam and that of momentum
    turn their edges, 2 (1 + beta1) / ((1 - beta1) lr) and 2 (1 + momentum) / lr, into 2 / lr. A parameter that has no
    state yet (its first gradient is still to come) counts as gradient descent.

    Args:
        optimizer: after a step; learning rates may be tensors, which are waited for.
        parameters: that are looked at.
        sigma: factor of a clipped method by parameter; 1 where it is not given.

    Source: Cohen et al. (2022), Adaptive Gradient Methods at the Edge of Stability, section 2; Cohen et al. (2021),
        Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, appendix B.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    lr = next((float(g["lr"]) for g in optimizer.param_groups if float(g["lr"]) > 0), 0.0)
    moved, diagonals, kinds = [], [], []
    for p in parameters:
        group = group_of.get(id(p))
        factor = 1.0 if sigma is None else sigma.get(p, 1.0)
        if group is None or not lr or factor == 0 or float(group["lr"]) == 0:
            continue
        kind, diagonal = _of_parameter(optimizer.state.get(p, {}), group, p)
        moved.append(p)
        diagonals.append(diagonal * (factor * float(group["lr"]) / lr))
        kinds.append(kind)
    return Preconditioner(
        parameters=moved, diagonals=diagonals, lr=lr, kind=" + ".join(dict.fromkeys(kinds)) or "nothing moves"
    )


def _of_parameter(state: Mapping[str, Any], group: Mapping[str, Any], p: Tensor) -> tuple[str, Tensor]:
    eps = float(group.get("eps", 0.0) or 0.0)
    if "sum" in state:
        return "adagrad", 1 / (state["sum"].sqrt() + eps)
    if "exp_avg_sq" in state:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        corrected = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
        return "adam", (1 - beta1) / (1 + beta1) / (corrected.sqrt() + eps)
    momentum = float(group.get("momentum", 0.0) or 0.0)
    scale = (1 + 2 * momentum if group.get("nesterov") else 1.0) / (1 + momentum)
    return "gradient descent", torch.full_like(p, scale)
