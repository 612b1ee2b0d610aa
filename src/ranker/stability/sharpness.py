"""Sharpness: the largest eigenvalue of the Hessian, and the learning rate relative to the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ranker.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """The largest eigenvalue, and what it means for the step.

    Attributes:
        value: largest eigenvalue of P^(1/2) H P^(1/2). H is the Hessian. The diagonal matrix P turns a gradient into
            an update per unit of learning rate: 1 for gradient descent, G^(-1/2) for Adagrad.
        error: bound on the error of the value.
        edge: 2 / value, the learning rate above which the iteration diverges on a quadratic; infinite where no
            eigenvalue is positive.
        ratio: learning rate / edge; above 1 the step is too large. 0 where no eigenvalue is positive.
        products: number of Hessian-vector products, each about twice the cost of a gradient.
    """

    value: float
    error: float
    edge: float
    ratio: float
    products: int


@dataclass(frozen=True, kw_only=True)
class Ritz:
    """An eigenvalue found by Lanczos.

    Attributes:
        value: the largest eigenvalue (by sign, not by absolute value).
        error: bound on the distance from ``value`` to an eigenvalue: norm2(A x - value x), x the eigenvector found.
        products: number of products with the operator.
    """

    value: float
    error: float
    products: int


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
    """Largest eigenvalue of the (preconditioned) Hessian of a loss, and the learning rate relative to its edge.

        w <- w - lr P grad(w)  on a quadratic diverges along u exactly where  lr > 2 / lambda,  P H u = lambda u

    P H is similar to P^(1/2) H P^(1/2), which is symmetric. With Adagrad's P = G^(-1/2) that is G^(-1/4) H G^(-1/4).

    Args:
        loss: scalar with its graph, of a probe batch; ReLU and the log loss can be differentiated twice.
        parameters: parameters that H is taken over. Dense gradients only: leave out tables with sparse gradients.
        lr: learning rate, per step.
        preconditioner: diagonal of P, one positive tensor per parameter (``step_preconditioner``); None for 1.
        max_products: largest number of Hessian-vector products.
        tolerance: relative tolerance of the eigenvalue.
        seed: seed of the starting vector.

    Raises:
        UserError: the preconditioner does not fit, or a value is not finite.

    Source: Tang et al. (2023), Figure 3 (the edge 2 / lambda); Cohen et al. (2022), Adaptive Gradient Methods at the
        Edge of Stability, section 2 (the preconditioned Hessian).
    """
    product = hessian_product(loss, parameters)
    count = sum(p.numel() for p in parameters)
    # Drawn on the CPU, so that the starting vector is the same on all devices.
    start = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(parameters[0])
    if preconditioner is None:
        ritz = largest_eigenvalue(product, start, max_products=max_products, tolerance=tolerance)
    else:
        root = torch.cat([d.detach().flatten() for d in preconditioner]).to(parameters[0]).sqrt()
        if root.numel() != count or not bool((root > 0).all()):
            raise UserError("sharpness: the preconditioner must have a number above 0 for each weight")
        ritz = largest_eigenvalue(
            lambda v: root * product(root * v), start, max_products=max_products, tolerance=tolerance
        )
    edge = 2.0 / ritz.value if ritz.value > 0 else math.inf
    return Sharpness(value=ritz.value, error=ritz.error, edge=edge, ratio=lr / edge, products=ritz.products)


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The map v to H v on flat vectors over all parameters, computed as the derivative of the gradient along v.

    Args:
        loss: scalar with its graph.
        parameters: parameters that H is taken over; H has rows of 0 for a parameter that the loss does not depend on.

    Raises:
        UserError: the loss depends on none of them.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    curved = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    if not any(g is not None for g in gradients):
        raise UserError("sharpness: the loss depends on none of the parameters given")
    sizes = [p.numel() for p in parameters]

    def product(v: Tensor) -> Tensor:
        pieces = v.split(sizes)
        rows: list[Tensor | None] = [None] * len(sizes)
        if curved:
            along = [pieces[i].view_as(parameters[i]) for i in curved]
            with torch.enable_grad():
                outputs = [gradients[i] for i in curved]
                rows = list(torch.autograd.grad(outputs, parameters, along, retain_graph=True, allow_unused=True))
        return torch.cat(
            [(torch.zeros_like(p) if r is None else r).flatten() for r, p in zip(rows, parameters, strict=True)]
        )

    return product


@torch.no_grad()
def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, *, max_products: int = 64, tolerance: float = 1e-3
) -> Ritz:
    """The largest eigenvalue of a symmetric operator, by Lanczos with full reorthogonalisation.

        w = A q_k - alpha_k q_k - beta_{k-1} q_{k-1},  beta_k = norm(w),  q_{k+1} = w / beta_k

    from q_1 = start / norm(start). The largest eigenvalue theta of the tridiagonal matrix of alpha and beta is the
    largest eigenvalue of A up to beta_k * abs(y_k), where y_k is the last entry of the eigenvector of theta. Each new
    vector is made orthogonal to all previous ones, twice: otherwise rounding errors produce copies of eigenvalues that
    were already found. Memory for one vector of the size of ``start`` per product.

    Args:
        product: v to A v, A symmetric.
        start: any vector that is not orthogonal to the eigenvector sought, such as a random one.
        max_products: largest number of products.
        tolerance: stop where the error bound is below this share of the eigenvalue.

    Raises:
        UserError: a product or the start is not finite, or the start is 0.

    Source: Lanczos (1950); the bound is Parlett (1998), The Symmetric Eigenvalue Problem, theorem 13.2.1.
    """
    norm = float(torch.linalg.vector_norm(start))
    if not 0 < norm < math.inf:
        raise UserError(f"sharpness: the starting vector must be finite and not 0, its norm is {norm}")
    most = min(max_products, start.numel())
    basis_KN = start.new_empty(most, start.numel())
    basis_KN[0] = start / norm
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        count = len(alphas) + 1
        span_kN = basis_KN[:count]
        w = product(span_kN[-1])
        alphas.append(float(w.dot(span_kN[-1])))
        for _ in range(2):
            w = w - span_kN.T @ (span_kN @ w)
        beta = float(torch.linalg.vector_norm(w))
        if not beta < math.inf:
            raise UserError("sharpness: a Hessian-vector product is not finite; the loss or its gradient is not either")
        values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
        value, error = float(values[-1]), beta * abs(float(vectors[-1, -1]))
        # If w is of the size of rounding errors, the basis spans all that the start can reach, and the value is exact.
        exhausted = beta <= 10 * torch.finfo(w.dtype).eps * float(values.abs().max())
        if error <= tolerance * abs(value) or exhausted or count == most:
            return Ritz(value=value, error=error, products=count)
        betas.append(beta)
        basis_KN[count] = w / beta


def _tridiagonal(diagonal: list[float], off_diagonal: list[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        off = torch.tensor(off_diagonal, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    return matrix
