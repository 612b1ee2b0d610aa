"""The step in plain torch: reduce, then apply. Every device and dtype; the other backends must agree with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.reductions import Coordinates, Reduction
from optim.work import Piece, Work, pieces


def coordinates(work: Work, piece: Piece) -> Coordinates:
    """Compute w, g, r of a piece."""
    weight, grad = piece.effective(work.settings)
    update, scale = work.method.update.direction(grad, piece.state, work.settings)
    return Coordinates(weight, grad, update, scale)


def reduce(work: Work, reductions: Sequence[Reduction]) -> dict[str, Tensor]:
    """Reduce one tensor, local part only: 0-d numbers, or one a unit where the work has `unit_dims`."""
    dims = work.unit_dims
    parts: dict[str, list[Tensor]] = {reduction.name: [] for reduction in reductions}
    for piece in pieces(work):
        at = coordinates(work, piece)
        for reduction in reductions:
            parts[reduction.name].append(_collapse(reduction, reduction.map(at, work.settings), dims))
    binding = work.method.binding
    if binding is not None and binding in reductions and dims is None and len(parts[binding.name]) > 1:
        work.peaks = torch.stack(parts[binding.name])
    return {reduction.name: _join(reduction, parts[reduction.name]) for reduction in reductions}


def _collapse(reduction: Reduction, values: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    if dims == ():  # a unit is a single coordinate
        return values.abs()
    if values.numel() == 0:
        return values.new_zeros(()) if dims is None else values.new_zeros((values.shape[0], *(1 for _ in dims)))
    if reduction.combine == "norm":
        return torch.linalg.vector_norm(values, dim=dims, keepdim=dims is not None)
    return values.amax() if dims is None else values.amax(dim=dims, keepdim=True)


def _join(reduction: Reduction, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    together = torch.stack(parts)
    return torch.linalg.vector_norm(together) if reduction.combine == "norm" else together.amax()


def is_finite(work: Work) -> Tensor:
    """Return whether all of the local gradient is finite, as a 0-d bool on its device."""
    if work.grad.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=work.grad.device)
    return torch.linalg.vector_norm(work.grad, ord=torch.inf).isfinite()


def apply(work: Work, ok: Tensor | None) -> None:
    """Write w <- w - lr * sigma * r and the state; where `ok` is false on the device, change nothing by one bit."""
    after: Mapping[str, Tensor] = {}
    for piece in pieces(work):
        weight, after = _advance(work, piece)
        _write(piece.weight, weight, ok)
        for key, value in after.items():
            if value.ndim or not work.weight.ndim:
                _write(piece.state[key], value, ok)
    if work.weight.ndim:
        for key, value in after.items():
            if not value.ndim:  # counts: every piece must see the old one
                _write(work.state[key], value, ok)
    work.write_back()


def _advance(work: Work, piece: Piece) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the new weight and the new state of a piece."""
    settings, sigma, update = work.settings, work.sigma, work.method.update
    lr: Any = settings["lr"]
    weight, grad = piece.effective(settings)
    fed = grad * sigma if sigma is not None and settings.get("clip_accumulator", False) else grad
    if work.clips_gradient:
        grad, sigma = fed, None
    step = update.direction(grad, piece.state, settings).update
    after = update.advance(fed, piece.state, settings)
    if settings["decoupled_weight_decay"]:
        weight = weight * (1 - lr * settings["weight_decay"])
    return weight - step * (lr if sigma is None else lr * sigma), after


def _write(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    # A product with 0 would turn an infinity into NaN; a selection keeps the old bits.
    target.copy_(value if ok is None else torch.where(ok, value.to(target.dtype), target))
