"""What the stability tools read from an optimizer: reports of its steps, and the diagonal that scales a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class StepReport(Protocol):
    """What the last step did to one parameter; scalars on the parameter's device."""

    @property
    def sigma(self) -> Tensor:
        """Factor that clipping applied; the smallest one where there are several."""
        ...

    @property
    def direction_max(self) -> Tensor:
        """Infinity norm of the update per unit of learning rate, before sigma; nan where it is unknown."""
        ...

    @property
    def clipped(self) -> bool:
        """Whether the method has a rule that chooses sigma; without one sigma is 1."""
        ...


@runtime_checkable
class ReportsSteps(Protocol):
    """An optimizer that reports what its last step did. ``isinstance`` checks that the method exists."""

    def last_step(self) -> Mapping[str, StepReport]:
        """Reports by parameter name. Reading a value waits for the device; calling this does not."""
        ...


@dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """A step of an optimizer, written as w <- w - lr P grad(w) with a diagonal P.

    Attributes:
        parameters: parameters that the step moves. Those whose learning rate or sigma is 0 are left out.
        diagonals: diagonal of P, one tensor per parameter.
        lr: learning rate that P is relative to, per step.
        kind: where P comes from: ``adagrad``, ``adam``, ``gradient descent``, or several joined by a plus.
    """

    parameters: list[Tensor]
    diagonals: list[Tensor]
    lr: float
    kind: str

    @property
    def is_identity(self) -> bool:
        """Whether P is the identity, so that the plain Hessian decides."""
        return self.kind == "gradient descent" and all(bool((d == 1).all()) for d in self.diagonals)


def group_by_parameter(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The parameter group of each parameter, by ``id`` of the parameter."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def adagrad_denominator(
    state: Mapping[str, Any], group: Mapping[str, Any], gradient: Tensor | None = None
) -> Tensor | None:
    """What an Adagrad-like optimizer divides a gradient by: sqrt(G) + eps, or sqrt(G + g^2) + eps with a gradient g.

    Args:
        state: the optimizer's state of the parameter. G is ``state["sum"]``, as in torch.optim.Adagrad and in all
            Adagrad-like optimizers of this project.
        group: the parameter's group; eps is ``group["eps"]``, or 0 without that key.
        gradient: a gradient that is not yet in G. Pass it before ``step()`` to get the denominator of that step.

    Returns:
        A new tensor in the shape of G; None where the optimizer keeps no such accumulator.
    """
    if "sum" not in state:
        return None
    total: Tensor = state["sum"]
    root = total.sqrt() if gradient is None else torch.addcmul(total, gradient, gradient).sqrt_()
    return root.add_(float(group.get("eps") or 0.0))


ADAPTED = 2.0  # a coordinate has adapted once G is above this many times G_0


class Adaptation(NamedTuple):
    """How many coordinates of Adagrad have adapted their step size.

    Attributes:
        share: share of the coordinates with G > 2 G_0, a scalar on the device. Below 0.5 the median coordinate is
            still at its start.
        start: G_0, in units of a squared gradient; the smallest one where groups of parameters differ.
    """

    share: Tensor
    start: float


@torch.no_grad()
def adaptation(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> Adaptation | None:
    """The share of coordinates whose accumulator has left its start, G > 2 G_0. One pass over G.

    Until then a coordinate divides its gradient by sqrt(G_0): Adagrad is gradient descent at lr / sqrt(G_0). Of
    sharded parameters, this rank's part counts. A G that is nan counts as not adapted.

    Args:
        optimizer: G is ``state["sum"]`` and G_0 is ``group["initial_accumulator_value"]``, as in torch.optim.Adagrad
            and in all Adagrad-like optimizers of this project.
        parameters: some of its parameters; those without such an accumulator are left out.

    Returns:
        None where no parameter has an accumulator.
    """
    groups = group_by_parameter(optimizer)
    counts, size, starts = [], 0, []
    for p in parameters:
        total, start = optimizer.state.get(p, {}).get("sum"), groups.get(id(p), {}).get("initial_accumulator_value")
        if total is None or start is None:
            continue
        own = total.to_local() if isinstance(total, DTensor) else total
        counts.append((own > ADAPTED * float(start)).sum())
        size += own.numel()
        starts.append(float(start))
    if not counts or not size:
        return None
    return Adaptation(torch.stack(counts).sum() / size, min(starts))


@torch.no_grad()
def step_preconditioner(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], *, sigma: Mapping[Tensor, float] | None = None
) -> Preconditioner:
    """P of the next step, from the optimizer's state after a step.

        adagrad            sigma / (sqrt(G) + eps)                               state ``sum``
        adam               sigma / (sqrt(v / (1 - beta2^t)) + eps) * (1 - beta1) / (1 + beta1)   ``exp_avg_sq``
        gradient descent   sigma / (1 + momentum), times (1 + 2 momentum) with Nesterov momentum; any other state

    Each is multiplied by the group's learning rate over the learning rate of the first group. The last factor of Adam
    and the factors of momentum convert their edges of stability, 2 (1 + beta1) / ((1 - beta1) lr) and
    2 (1 + momentum) / lr, to 2 / lr. A parameter without state (before its first gradient) counts as gradient descent.

    Args:
        optimizer: after a step. If learning rates are tensors on a GPU, reading them waits for the device.
        parameters: parameters to include.
        sigma: clipping factor by parameter; 1 where it is missing.

    Source: Cohen et al. (2022), Adaptive Gradient Methods at the Edge of Stability, section 2; Cohen et al. (2021),
        Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, appendix B.
    """
    groups = group_by_parameter(optimizer)
    lr = next((float(g["lr"]) for g in optimizer.param_groups if float(g["lr"]) > 0), 0.0)
    moved, diagonals, kinds = [], [], []
    for p in parameters:
        group = groups.get(id(p))
        factor = 1.0 if sigma is None else sigma.get(p, 1.0)
        if group is None or not lr or factor == 0 or float(group["lr"]) == 0:
            continue
        kind, diagonal = _kind_and_diagonal(optimizer.state.get(p, {}), group, p)
        moved.append(p)
        diagonals.append(diagonal * (factor * float(group["lr"]) / lr))
        kinds.append(kind)
    return Preconditioner(
        parameters=moved, diagonals=diagonals, lr=lr, kind=" + ".join(dict.fromkeys(kinds)) or "nothing moves"
    )


def _kind_and_diagonal(state: Mapping[str, Any], group: Mapping[str, Any], p: Tensor) -> tuple[str, Tensor]:
    denominator = adagrad_denominator(state, group)
    if denominator is not None:
        return "adagrad", 1 / denominator
    if "exp_avg_sq" in state:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        corrected = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
        return "adam", (1 - beta1) / (1 + beta1) / (corrected.sqrt() + float(group.get("eps") or 0.0))
    momentum = float(group.get("momentum") or 0.0)
    scale = (1 + 2 * momentum if group.get("nesterov") else 1.0) / (1 + momentum)
    return "gradient descent", torch.full_like(p, scale)
