"""The step in plain torch: every device, dtype and method. The other backend must agree with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.batch import Batch, Moved
from optim.fused import step_fused, takes_fused
from optim.reductions import UPDATE_MAX, UPDATE_NORM, Coordinates, Reduction
from optim.work import Piece, Work, pieces


def coordinates(work: Work, piece: Piece) -> Coordinates:
    """Compute w, g, r of a piece."""
    weight, grad = piece.effective(work.settings)
    update, scale = work.method.update.direction(grad, piece.state, work.settings)
    return Coordinates(weight, grad, update, scale)


class Eager:
    """Tensor by tensor, on the CPU piece by piece, so that temporaries stay in cache."""

    def takes(self, _work: Work) -> bool:
        """Return True."""
        return True

    def renew(self, _batch: Batch) -> bool:
        """Return False: beside these operations, finding out what to do takes no time."""
        return False

    def reduce(self, batch: Batch, reductions: Sequence[Reduction]) -> dict[str, Tensor]:
        """Reduce the local parts."""
        parts = [_reduce(work, reductions) for work in batch.works]
        binding = batch.method.binding
        if binding is not None and binding in reductions and not batch.by_unit:
            batch.peaks = lambda: [part[binding.name] if part[binding.name].ndim else None for part in parts]
        if batch.by_unit:
            return parts[0]
        return {
            reduction.name: _stack([_join(reduction, part[reduction.name]) for part in parts])
            for reduction in reductions
        }

    def finite(self, batch: Batch) -> Tensor:
        """Look at all gradients."""
        return torch.stack([work.is_finite() for work in batch.works])

    def apply(self, batch: Batch, ok: Tensor | None, *, measure: bool) -> Moved | None:
        """Take the step."""
        if takes_fused(batch):
            moved = self._look_ahead(batch) if measure else None
            step_fused(batch, ok)
            return moved
        sigmas = [None] * len(batch.works) if batch.sigma is None else [batch.sigma] if batch.by_unit else batch.sigma
        sizes = [
            _apply(work, sigma, batch.clips_gradient, ok, measure)
            for work, sigma in zip(batch.works, sigmas, strict=True)
        ]
        return Moved(*(_stack(list(values)) for values in zip(*sizes, strict=True))) if measure else None

    def _look_ahead(self, batch: Batch) -> Moved:
        """Return how far the step will go where the kernel that takes it cannot tell; sigma is 1 there."""
        sizes, lr = self.reduce(batch, (UPDATE_MAX, UPDATE_NORM)), batch.settings["lr"]
        return Moved(sizes[UPDATE_MAX.name] * lr, sizes[UPDATE_NORM.name] * lr)


EAGER = Eager()


def _reduce(work: Work, reductions: Sequence[Reduction]) -> dict[str, Tensor]:
    """Reduce one tensor: 0-d, [pieces] where it was cut, or one number a unit."""
    dims = work.unit_dims
    parts: dict[str, list[Tensor]] = {reduction.name: [] for reduction in reductions}
    for piece in pieces(work):
        at = coordinates(work, piece)
        for reduction in reductions:
            parts[reduction.name].append(_collapse(reduction, reduction.map(at, work.settings), dims))
    return {name: values[0] if len(values) == 1 else torch.stack(values) for name, values in parts.items()}


def _collapse(reduction: Reduction, values: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    if dims == ():  # a unit is a single coordinate
        return values.abs()
    if values.numel() == 0:
        return values.new_zeros(()) if dims is None else values.new_zeros((values.shape[0], *(1 for _ in dims)))
    if reduction.combine == "norm":
        return torch.linalg.vector_norm(values, dim=dims, keepdim=dims is not None)
    return values.amax() if dims is None else values.amax(dim=dims, keepdim=True)


def _join(reduction: Reduction, parts: Tensor) -> Tensor:
    if parts.ndim == 0:
        return parts
    return torch.linalg.vector_norm(parts) if reduction.combine == "norm" else parts.amax()


def _stack(values: list[Tensor]) -> Tensor:
    """Stack 0-d tensors, in the widest of their dtypes."""
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return torch.stack([value.to(dtype) for value in values])


def _apply(
    work: Work, sigma: Tensor | None, clips_gradient: bool, ok: Tensor | None, measure: bool
) -> tuple[Tensor, Tensor] | None:
    """Write w <- w - lr * sigma * r and the state of one tensor; return the infinity norm and the 2-norm if asked."""
    after: Mapping[str, Tensor] = {}
    sizes = []
    for piece in pieces(work):
        weight, step, after = _advance(work, piece, sigma, clips_gradient)
        _write(piece.weight, weight - step, ok)
        if measure:
            sizes.append((_collapse(UPDATE_MAX, step.abs(), None), _collapse(UPDATE_NORM, step, None)))
        for key, value in after.items():
            if value.ndim or not work.weight.ndim:
                _write(piece.state[key], value, ok)
    if work.weight.ndim:
        for key, value in after.items():
            if not value.ndim:  # a count: every piece had to see the old one
                _write(work.state[key], value, ok)
    work.write_back()
    if not measure:
        return None
    largest, norms = (torch.stack(values) for values in zip(*sizes, strict=True))
    return _join(UPDATE_MAX, largest), _join(UPDATE_NORM, norms)


def _advance(
    work: Work, piece: Piece, sigma: Tensor | None, clips_gradient: bool
) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """Return the weight, decoupled decay applied, the step to subtract from it, and the new state of a piece."""
    settings, update = work.settings, work.method.update
    lr: Any = settings["lr"]
    weight, grad = piece.effective(settings)
    sigma = None if sigma is None else sigma.to(weight.dtype)
    fed = grad * sigma if sigma is not None and settings.get("clip_accumulator", False) else grad
    if clips_gradient:
        grad, sigma = fed, None
    step = update.direction(grad, piece.state, settings).update
    after = update.advance(fed, piece.state, settings)
    if settings["decoupled_weight_decay"]:
        weight = weight * (1 - lr * settings["weight_decay"])
    return weight, step * (lr if sigma is None else lr * sigma), after


def _write(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    # A product with 0 would turn an infinity into NaN; a selection keeps the old bits.
    target.copy_(value if ok is None else torch.where(ok, value.to(target.dtype), target))
