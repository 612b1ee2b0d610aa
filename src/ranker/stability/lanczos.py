"""The largest eigenvalue of a symmetric operator that is only known by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ranker.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ritz:
    """An eigenvalue found by Lanczos.

    Attributes:
        value: the largest eigenvalue (by sign, not by size).
        vector: its eigenvector, of norm 1.
        error: bound on the distance from ``value`` to an eigenvalue, norm2(A x - value x).
        products: products with the operator that were needed.
    """

    value: float
    vector: Tensor
    error: float
    products: int


@torch.no_grad()
def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, *, max_products: int = 64, tolerance: float = 1e-3
) -> Ritz:
    """Lanczos with full reorthogonalisation.

        w = A q_k - alpha_k q_k - beta_{k-1} q_{k-1},  beta_k = norm(w),  q_{k+1} = w / beta_k

    from q_1 = start / norm(start). The largest eigenvalue theta of the tridiagonal matrix of alpha and beta is that of
    A up to beta_k * abs(y_k), where y_k is the last entry of theta's eigenvector. Every new vector is made orthogonal
    to all before, twice: without that, rounding brings copies of eigenvalues already found. It keeps one vector of
    the size of ``start`` a product.

    Args:
        product: v to A v, A symmetric.
        start: any vector with a share of the eigenvector sought; a random one has it.
        max_products: stop after so many products.
        tolerance: stop where the error bound is below this share of the eigenvalue.

    Raises:
        UserError: a product or the start is not finite, or the start is 0.

    Source: Lanczos (1950); the bound is Parlett (1998), The Symmetric Eigenvalue Problem, theorem 13.2.1.
    """
    norm = float(torch.linalg.vector_norm(start))
    if not 0 < norm < float("inf"):
        raise UserError(f"sharpness: the starting vector must be finite and not 0, its norm is {norm}")
    most = min(max_products, start.numel())
    basis_KN = start.new_empty(most, start.numel())
    basis_KN[0] = start / norm
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        count = len(diagonal) + 1
        span_kN = basis_KN[:count]
        w = product(span_kN[-1])
        diagonal.append(float(w.dot(span_kN[-1])))
        for _ in range(2):
            w = w - span_kN.T @ (span_kN @ w)
        beta = float(torch.linalg.vector_norm(w))
        if not beta < float("inf"):
            raise UserError("sharpness: a Hessian-vector product is not finite; the loss or its gradient is not either")
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        value, error = float(values[-1]), beta * abs(float(vectors[-1, -1]))
        # A rest of the size of rounding: the basis spans all that the start can reach, and the value is exact there.
        exhausted = beta <= 10 * torch.finfo(w.dtype).eps * float(values.abs().max())
        if error <= tolerance * abs(value) or exhausted or count == most:
            return Ritz(value=value, vector=span_kN.T @ vectors[:, -1].to(w), error=error, products=count)
        beside.append(beta)
        basis_KN[count] = w / beta


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    return matrix
