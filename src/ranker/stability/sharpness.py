"""How steep the loss is where the model stands, and whether the step is too large for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ranker.errors import UserError
from ranker.stability.lanczos import Ritz, largest_eigenvalue


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """The largest eigenvalue that a step meets.

    Attributes:
        value: largest eigenvalue of P^(1/2) H P^(1/2); H is the Hessian and P the diagonal that turns a gradient into
            an update per unit of learning rate, 1 for gradient descent, G^(-1/2) for Adagrad.
        error: bound on its error.
        edge: 2 / value, the learning rate above which the iteration grows on a quadratic; infinite where the
            loss curves down everywhere.
        ratio: learning rate / edge; above 1 the step is too large. 0 where the loss curves down everywhere.
        products: Hessian-vector products it took, each about twice the cost of a gradient.
    """

    value: float
    error: float
    edge: float
    ratio: float
    products: int


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The map v to H v, on flat vectors over all the parameters, by differentiating the gradient along v.

    Args:
        loss: scalar with its graph.
        parameters: that H is taken over; one the loss does not depend on has rows of 0.

    Raises:
        UserError: the loss depends on none of them.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    live = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    if not any(g is not None for g in gradients):
        raise UserError("sharpness: the loss depends on none of the parameters given")
    sizes = [p.numel() for p in parameters]

    def product(v: Tensor) -> Tensor:
        pieces = v.split(sizes)
        rows: list[Tensor | None] = [None] * len(sizes)
        if live:
            along = [pieces[i].view_as(parameters[i]) for i in live]
            with torch.enable_grad():
                outputs = [gradients[i] for i in live]
                rows = list(torch.autograd.grad(outputs, parameters, along, retain_graph=True, allow_unused=True))
        return torch.cat(
            [(torch.zeros_like(p) if r is None else r).flatten() for r, p in zip(rows, parameters, strict=True)]
        )

    return product


def measure_sharpness(
    loss: Tensor,
    parameters: Sequence[Tensor],
    *,
    lr: float,
    preconditioner: Sequence[Tensor] | None = None,
    max_products: int = 64,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Sharpness:
    """Largest eigenvalue of the (preconditioned) Hessian of a loss, and the learning rate beside its edge.

        w <- w - lr P grad(w)  on a quadratic grows along u exactly where  lr > 2 / lambda,  P H u = lambda u

    P H is similar to P^(1/2) H P^(1/2), which is symmetric. With Adagrad's P = G^(-1/2) that is G^(-1/4) H G^(-1/4).

    Args:
        loss: scalar with its graph, of a probe batch; ReLU and the log loss can be differentiated twice.
        parameters: that are looked at. Dense gradients only: embedding tables of sparse gradients must stay out.
        lr: learning rate, per step.
        preconditioner: the diagonal of P by parameter, all above 0 (``step_preconditioner``); None for 1.
        max_products: at most so many Hessian-vector products.
        tolerance: of the eigenvalue, relative.
        seed: of the starting vector.

    Raises:
        UserError: the preconditioner does not fit, or something is not finite.

    Source: Tang et al. (2023), Figure 3 (the edge 2 / lambda); Cohen et al. (2022), Adaptive Gradient Methods at the
        Edge of Stability, section 2 (the preconditioned Hessian).
    """
    ritz = _largest(hessian_product(loss, parameters), parameters, preconditioner, max_products, tolerance, seed)
    curved_up = ritz.value > 0
    edge = 2.0 / ritz.value if curved_up else float("inf")
    return Sharpness(
        value=ritz.value, error=ritz.error, edge=edge, ratio=lr / edge if curved_up else 0.0, products=ritz.products
    )


def _largest(
    product: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    preconditioner: Sequence[Tensor] | None,
    max_products: int,
    tolerance: float,
    seed: int,
) -> Ritz:
    first = parameters[0]
    count = sum(p.numel() for p in parameters)
    # Drawn on the CPU, so that the start is the same on every device.
    start = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(first)
    if preconditioner is None:
        return largest_eigenvalue(product, start, max_products=max_products, tolerance=tolerance)
    root = torch.cat([d.detach().flatten() for d in preconditioner]).to(first).sqrt()
    if root.numel() != count or not bool((root > 0).all()):
        raise UserError("sharpness: the preconditioner must have a number above 0 for each weight")
    return largest_eigenvalue(lambda v: root * product(root * v), start, max_products=max_products, tolerance=tolerance)
