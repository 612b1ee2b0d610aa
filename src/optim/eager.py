"""The step in plain torch, for every device, dtype and method: op by op, or as two functions under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from optim import torch_private
from optim.local_params import CHUNK, LocalParam, Piece, pieces
from optim.registry import UPDATE_MAX, UPDATE_NORM, Coordinates, Reduction, Settings, Update
from optim.tensor_group import Limiting, StepSize, TensorGroup, largest_term
from optim.updates import ADAGRAD

Sizes = tuple[Tensor, Tensor]
"""Infinity norm and 2-norm of a step."""


def _reduce_piece(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    settings: Settings,
    update: Update,
    reductions: Sequence[Reduction],
    dims: tuple[int, ...] | None,
) -> list[Tensor]:
    """Reduce one piece: 0-d tensors, or one number per unit."""
    at = Piece(weight, grad, state).coordinates(update, settings)
    return [_collapse(reduction, reduction.map(at, settings), dims) for reduction in reductions]


def _step_piece(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    sigma: Tensor | None,
    ok: Tensor | None,
    settings: Settings,
    update: Update,
    *,
    feeds_clipped: bool,
    clips_gradient: bool,
    measure: bool,
) -> tuple[dict[str, Tensor], Sizes | None]:
    """Write w <- w - lr * sigma * r and the elementwise state; return the new counts, and the step's size if asked."""
    lr: Any = settings["lr"]
    piece = Piece(weight, grad, state)
    before, seen = piece.effective(update, settings)
    if isinstance(lr, Tensor):  # 1 - lr * weight_decay is 1 in bfloat16
        lr = lr.to(torch.promote_types(lr.dtype, before.dtype))
    factor = None if sigma is None else sigma.to(before.dtype)
    fed = seen * factor if factor is not None and feeds_clipped else seen
    if clips_gradient:
        seen, factor = fed, None
    direction = piece.direction(before, seen, update, settings).update
    after: Mapping[str, Tensor] = update.advance(fed, state, settings)
    if settings["decoupled_weight_decay"]:
        before = before * (1 - lr * settings["weight_decay"])
    step = direction * (lr if factor is None else lr * factor)
    _write(weight, before - step, ok)
    size = (_collapse(UPDATE_MAX, step.abs(), None), _collapse(UPDATE_NORM, step, None)) if measure else None
    for key, value in after.items():
        if value.ndim:
            _write(state[key], value, ok)
    return {key: value for key, value in after.items() if not value.ndim}, size


def _limiting(local: LocalParam) -> list[Tensor]:
    """Return the largest value of the limiting reduction, its local flat index, and w, g, r (and the scale) there.

    All are 0-d. An empty tensor has value 0 at index -1.
    """
    limiting = local.method.limiting
    assert limiting is not None, "only methods with a limiting coordinate are asked"
    found, cut = [], list(pieces(local))
    with _one_thread(cut):
        for number, piece in enumerate(cut):
            at = [tensor for tensor in piece.coordinates(local.update, local.settings) if tensor is not None]
            if local.weight.numel() == 0:
                zero = local.weight.new_zeros(())
                return [zero, zero.long() - 1, *(zero for _ in at)]
            values = limiting.map(Coordinates(*at, *[None] * (4 - len(at))), local.settings)
            value, index = values.flatten().max(dim=0)
            found.append([value, index + number * CHUNK, *(torch.take(tensor, index) for tensor in at)])
    columns = [torch.stack(list(values)) for values in zip(*found, strict=True)]
    best = columns[0].argmax()
    return [torch.take(column, best) for column in columns]


def _collapse(reduction: Reduction, values: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    if dims == ():  # a unit is a single coordinate
        return values.abs()
    if values.numel() == 0:
        return values.new_zeros(()) if dims is None else values.new_zeros((values.shape[0], *(1 for _ in dims)))
    if reduction.combine == "norm":
        return _norm(values, dims)
    return values.amax() if dims is None else values.amax(dim=dims, keepdim=True)


def _join(reduction: Reduction, parts: Sequence[Tensor]) -> Tensor:
    """Combine the reductions of a tensor's pieces."""
    if len(parts) == 1:
        return parts[0]
    together = torch.stack(list(parts))
    return _norm(together, None) if reduction.combine == "norm" else together.amax()


def _norm(values: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """Return the 2-norm, also of values whose squares leave the range of their dtype."""
    # A factor that is a power of 2 changes no bit of a norm that can be computed without it.
    least, largest = torch.aminmax(values) if dims is None else (values.amin(dims, True), values.amax(dims, True))
    size = torch.maximum(-least, largest)
    scale = torch.ones_like(size).where(size < 2.0**50, 2.0**-80).where(size > 2.0**-50, 2.0**80)
    norm: Tensor = torch.linalg.vector_norm(values * scale, dim=dims, keepdim=dims is not None)
    return norm / scale


def _by_name(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Turn one mapping per tensor into one vector per name."""
    return {name: _stack([part[name] for part in parts]) for name in parts[0]}


def _stack(values: list[Tensor]) -> Tensor:
    """Stack 0-d tensors, in the widest of their dtypes."""
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return torch.stack([value.to(dtype) for value in values])


def _write(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    # A product with 0 would turn an infinity into NaN. A selection keeps the old bits.
    target.copy_(value if ok is None else torch.where(ok, value.to(target.dtype), target))


def _one_thread(cut: Sequence[Piece]) -> AbstractContextManager[None]:
    """Work on one thread, where a tensor was cut into pieces.

    On several threads every operation on a piece ends with all of them waiting for each other. Where other processes
    take the processors, that makes a step of half a second last for ten.
    """
    return nullcontext() if len(cut) == 1 or torch.get_num_threads() == 1 else _without_threads()


@contextmanager
def _without_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Eager:
    """Tensor by tensor; on the CPU piece by piece, so that temporaries stay in cache."""

    reduce_piece: Callable[..., list[Tensor]] = staticmethod(_reduce_piece)
    step_piece: Callable[..., tuple[dict[str, Tensor], Sizes | None]] = staticmethod(_step_piece)

    def takes(self, _local: LocalParam) -> bool:
        """Return True."""
        return True

    def pieces(self, local: LocalParam) -> list[Piece]:
        """Return what one call of `reduce_piece` or `step_piece` works on."""
        return list(pieces(local))

    def settings(self, local: LocalParam) -> Settings:
        """Return the settings that `reduce_piece` and `step_piece` see."""
        return local.settings

    def reduce(self, group: TensorGroup, reductions: Sequence[Reduction]) -> dict[str, Tensor]:
        """Reduce the local parts."""
        parts = [self._reduce(local, reductions, local.unit_dims) for local in group.locals]
        return parts[0] if group.by_unit else _by_name(parts)

    def _reduce(
        self, local: LocalParam, reductions: Sequence[Reduction], dims: tuple[int, ...] | None
    ) -> dict[str, Tensor]:
        settings, cut = self.settings(local), self.pieces(local)
        with _one_thread(cut):
            found = [
                self.reduce_piece(piece.weight, piece.grad, piece.state, settings, local.update, reductions, dims)
                for piece in cut
            ]
        parts = zip(*found, strict=True)
        return {reduction.name: _join(reduction, values) for reduction, values in zip(reductions, parts, strict=True)}

    def limiting(self, group: TensorGroup) -> Limiting:
        """Compute the limiting reduction again and take its largest coordinate."""
        found = [_limiting(local) for local in group.locals]
        value, position, weight, grad, update, *scale = (_stack(list(part)) for part in zip(*found, strict=True))
        at = Coordinates(weight, grad, update, scale[0] if scale else None)
        return Limiting(value, position, largest_term(group, at), weight == 0)

    def finite(self, group: TensorGroup) -> Tensor:
        """Check all gradients."""
        return torch.stack([local.is_finite() for local in group.locals])

    def apply_and_record(self, group: TensorGroup, ok: Tensor | None, rows: Sequence[Tensor]) -> bool:
        """Return False: there is no faster way than that of `stats.py`."""
        del group, ok, rows
        return False

    def apply(self, group: TensorGroup, ok: Tensor | None, *, measure: bool) -> StepSize | None:
        """Take the step."""
        if _takes_fused(group):
            size = self._size_ahead(group) if measure else None
            _step_fused(group, ok)
            return size
        sigmas = [None] * len(group.locals) if group.sigma is None else [group.sigma] if group.by_unit else group.sigma
        pairs = zip(group.locals, sigmas, strict=True)
        sizes = [self._step(group, local, sigma, ok, measure=measure) for local, sigma in pairs]
        return StepSize(*(_stack(list(values)) for values in zip(*sizes, strict=True))) if measure else None

    def _size_ahead(self, group: TensorGroup) -> StepSize:
        """Return how far a step with sigma = 1 will go, for the fused kernel, which does not measure."""
        sizes = _by_name([self._reduce(local, (UPDATE_MAX, UPDATE_NORM), None) for local in group.locals])
        lr = group.settings["lr"]
        return StepSize(sizes[UPDATE_MAX.name] * lr, sizes[UPDATE_NORM.name] * lr)

    def _step(
        self, group: TensorGroup, local: LocalParam, sigma: Tensor | None, ok: Tensor | None, *, measure: bool
    ) -> tuple[Tensor, ...]:
        """Step one tensor and its state; return the norms of the step if asked."""
        settings, update = self.settings(local), local.update
        feeds = sigma is not None and local.method.feeds_clipped(local.settings)
        form = {"feeds_clipped": feeds, "clips_gradient": group.clips_gradient, "measure": measure}
        counts: dict[str, Tensor] = {}
        sizes = []
        cut = self.pieces(local)
        with _one_thread(cut):
            for piece in cut:
                counts, size = self.step_piece(
                    piece.weight, piece.grad, piece.state, sigma, ok, settings, update, **form
                )
                sizes.append(size)
        for key, value in counts.items():  # every piece had to see the old count
            _write(local.state[key], value, ok)
        local.write_back()
        if not measure:
            return ()
        largest, norms = zip(*(size for size in sizes if size), strict=True)
        return _join(UPDATE_MAX, largest), _join(UPDATE_NORM, norms)


class Compiled(Eager):
    """The same two functions under torch.compile: one kernel for a reduction, one for a step, per tensor.

    The first step compiles, which takes from some seconds to a minute. Tensors are flattened and the learning rate is
    passed as a tensor, so that other shapes and a schedule do not compile again.
    """

    def __init__(self, compiler: str = "inductor") -> None:
        self.compiler = compiler

    # Properties, because torch.compile takes a second to import what it needs.
    @functools.cached_property
    def reduce_piece(self) -> Callable[..., list[Tensor]]:  # type: ignore[override]
        """Return the compiled reduction."""
        return torch.compile(_reduce_piece, dynamic=True, backend=self.compiler)

    @functools.cached_property
    def step_piece(self) -> Callable[..., tuple[dict[str, Tensor], Sizes | None]]:  # type: ignore[override]
        """Return the compiled step."""
        return torch.compile(_step_piece, dynamic=True, backend=self.compiler)

    def pieces(self, local: LocalParam) -> list[Piece]:
        """Return the whole tensor, flattened where that is a view and sigma needs no rows."""
        state = {key: value for key, value in local.state.items() if value.ndim}
        tensors = (local.weight, local.grad, *state.values())
        if local.unit_dims is not None or not local.weight.ndim or not all(one.is_contiguous() for one in tensors):
            return [Piece(local.weight, local.grad, local.state)]
        flat = {key: value.view(-1) for key, value in state.items()}
        return [Piece(local.weight.view(-1), local.grad.view(-1), {**local.state, **flat})]

    def settings(self, local: LocalParam) -> Settings:
        """Return the hyperparameters, with the learning rate as a tensor on the device."""
        numbers = {name: value for name, value in local.settings.items() if name not in ("params", "param_names")}
        lr = numbers["lr"]
        if not isinstance(lr, Tensor):
            numbers["lr"] = torch.full((), lr, dtype=torch.float64, device=local.weight.device)
        return numbers


def _takes_fused(group: TensorGroup) -> bool:
    """Whether torch's fused Adagrad kernel computes exactly this step: sigma is 1, and the update is its Adagrad.

    The kernel walks memory, so a tensor, its gradient and its state must be laid out alike.
    """
    settings, device = group.settings, group.device
    lr = settings["lr"]
    return (
        group.never_clips
        and not torch.compiler.is_compiling()
        and not settings["decoupled_weight_decay"]
        # The kernel for the CPU would wait for a learning rate that is a tensor.
        and (not isinstance(lr, Tensor) or (lr.device == device and device.type != "cpu"))
        and all(
            local.update == ADAGRAD
            and torch_private.has_fused_adagrad(local.weight)
            and local.weight.dtype in (torch.float32, torch.float64)
            and local.grad.dtype == local.state["sum"].dtype == local.weight.dtype
            and all(tensor.is_contiguous() for tensor in (local.weight, local.grad, local.state["sum"]))
            for local in group.locals
        )
    )


def _step_fused(group: TensorGroup, ok: Tensor | None) -> None:
    settings = group.settings
    torch_private.fused_adagrad(
        [local.weight for local in group.locals],
        [local.grad for local in group.locals],
        [local.state["sum"] for local in group.locals],
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
        maximize=settings["maximize"],
        ok=ok,
    )
    for local in group.locals:
        local.write_back()


EAGER = Eager()
COMPILED = Compiled()
