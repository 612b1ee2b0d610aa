"""The backend that calls the C kernels, and the structures that it passes to them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optim.eager import EAGER
from optim.local_params import CHUNK, LocalParam, Piece, coupled_decay, decays_update
from optim.native.library import load
from optim.native.structs import SettingsStruct, TensorStruct
from optim.registry import Method, Reduction
from optim.stats import FIELDS
from optim.tensor_group import Limiting, StepSize, TensorGroup, largest_term
from optim.torch_private import is_plain
from optim.updates import Adagrad, Adam

REDUCTIONS = ("grad_norm", "weight_norm", "update_norm", "update_max", "overshoot")
"""What the C code computes, in the order of its columns. Of norms it returns the squares."""
COLUMNS = (*REDUCTIONS, "index", "weight", "grad", "total", "moment")
"""Then, for the largest overshoot: its flat index, and w, g (sign and decay included), G (of Adam v) and m there."""
OVERSHOOT = COLUMNS.index("overshoot")
NO_BOUND = (0.0, 0.0, 0.0)
_ROW = torch.Size([len(FIELDS)])


def is_available() -> bool:
    """Whether the kernels are there. Compiles them at the first call."""
    return load() is not None


def has_kernels(method: Method) -> bool:
    """Whether the kernels compute a method's update and all that its rule asks for."""
    return isinstance(method.update, Adagrad | Adam) and all(reduction.kernel for reduction in method.reductions)


class Native:
    """Dense, contiguous float32 and float64 tensors on the CPU, stepped by Adagrad or Adam, with reductions in C."""

    def takes(self, local: LocalParam) -> bool:
        """Whether the kernels can step this tensor."""
        return (
            local.unit_dims is None
            and has_kernels(local.method)
            and local.weight.dtype in (torch.float32, torch.float64)
            and not torch.compiler.is_compiling()
            and (_takes_adam(local) if isinstance(local.update, Adam) else isinstance(local.update, Adagrad))
            and _have_memory(local.weight, local.grad, *(value for value in _state(local) if value is not None))
            and is_available()
        )

    def reduce(self, group: TensorGroup, reductions: Sequence[Reduction]) -> dict[str, Tensor]:
        """Reduce the local parts, in float64."""
        prepared, settings = prepare(group), _settings(group, reductions)
        # An overshoot of at most 1 / lr does not clip, so the search for the largest one starts there.
        lr = _lr(group) if settings.overshoot else None
        _call("optim_reduce", prepared, settings, lr, prepared.parts, prepared.columns)
        group.scratch = settings
        found = {reduction: prepared.columns[:, COLUMNS.index(reduction.kernel or "")] for reduction in reductions}
        return {
            reduction.name: column.sqrt() if reduction.combine == "norm" else column
            for reduction, column in found.items()
        }

    def limiting(self, group: TensorGroup) -> Limiting:
        """Return the coordinates that the first pass found, if it searched for them."""
        limiting = group.method.limiting
        if limiting is None or limiting.kernel != "overshoot":
            return EAGER.limiting(group)
        columns = prepare(group).columns
        value, index, *at = (column.contiguous() for column in columns[:, OVERSHOOT:].unbind(dim=1))
        weight, grad, total, moment = at
        state = {"sum": total, "exp_avg": moment, "exp_avg_sq": total}
        if isinstance(group.locals[0].update, Adam):
            state["step"] = torch.stack([local.state["step"] for local in group.locals])
        # Sign and coupled decay are in the gradient already.
        settings = {**group.settings, "maximize": False, "weight_decay": 0.0}
        coordinates = Piece(weight, grad, state).coordinates(group.locals[0].update, settings)
        return Limiting(value, index.long(), largest_term(group, coordinates), weight == 0)

    def finite(self, group: TensorGroup) -> Tensor:
        """Check all gradients."""
        finite = torch.empty(len(group.locals), dtype=torch.bool, device="cpu")
        _call("optim_finite", prepare(group), _settings(group, ()), finite)
        return finite

    def apply(self, group: TensorGroup, ok: Tensor | None, *, measure: bool) -> StepSize | None:
        """Take the step."""
        sizes = prepare(group).sizes if measure else None
        _step(group, ok, sizes)
        return None if sizes is None else StepSize(largest=sizes[:, 1], norm=sizes[:, 0].sqrt())

    def apply_and_record(self, group: TensorGroup, ok: Tensor | None, rows: Sequence[Tensor]) -> bool:
        """Take the step and update the rows, in C. Shards, and limits that C does not know, take the other way."""
        limiting, prepared = group.method.limiting, prepare(group)
        if not prepared.whole or not (limiting is None or limiting.kernel == "overshoot"):
            return False
        if len(prepared.rows) != len(rows) or not all(map(_is_known, rows, prepared.rows)):
            if not all(map(_holds_a_row, rows)):
                return False
            prepared.rows = [(row, place_of(row)) for row in rows]
            prepared.row_pointers = (ctypes.c_void_p * len(rows))(*[row.data_ptr() for row in rows])
        settings, sigma = _step(group, ok, prepared.sizes)
        columns = None if limiting is None or group.scratch is None else prepared.columns
        _call("optim_record", prepared, settings, sigma, _lr(group), ok, columns, prepared.sizes, prepared.row_pointers)
        return True


NATIVE = Native()


def _state(local: LocalParam) -> tuple[Tensor, Tensor | None]:
    """Return G and None, or v and m of Adam."""
    state = local.state
    return (state["sum"], None) if isinstance(local.update, Adagrad) else (state["exp_avg_sq"], state["exp_avg"])


def _takes_adam(local: LocalParam) -> bool:
    """Whether Adam's count is where C can read it, and its moments are not fed something else than r is made of."""
    count = local.state["step"]
    readable = is_plain(count) and count.is_cpu and count.dtype == torch.float32 and count.ndim == 0
    return readable and not local.method.feeds_clipped(local.settings)


def _have_memory(weight: Tensor, *others: Tensor) -> bool:
    """Whether C may walk the memory of all tensors together: of one dtype and shape."""
    dtype, shape = weight.dtype, weight.shape
    return has_plain_memory(weight) and all(
        has_plain_memory(tensor) and tensor.dtype is dtype and tensor.shape == shape for tensor in others
    )


def has_plain_memory(tensor: Tensor) -> bool:
    """Whether C may walk the memory of a tensor: no subclass, no wrapper, no lazy negation; on the CPU, contiguous."""
    return (
        is_plain(tensor)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and bool(tensor.data_ptr() or not tensor.numel())  # memory that FSDP1 has freed for a while
    )


Place = tuple[int, torch.Size, torch.dtype]
"""Where the memory of a tensor begins, its shape and its dtype."""


def place_of(tensor: Tensor) -> Place:
    """Return where a tensor is."""
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def is_at(tensor: Tensor, place: Place) -> bool:
    """Whether a tensor that C could walk is where it was. Its `data`, `set_`, `t_`, `share_memory_` may have moved it.

    A lazy negation, as of an imaginary part, is not contiguous.
    """
    pointer, shape, dtype = place
    return tensor.data_ptr() == pointer and tensor.is_contiguous() and tensor.dtype is dtype and tensor.shape == shape


def _buffer(rows: int, columns: int) -> Tensor:
    return torch.empty(max(1, rows), columns, dtype=torch.float64, device="cpu")


@dataclass(slots=True)
class Prepared:
    """The tensors of a group as the C code sees them, and room for what it finds out about them, in float64.

    Attributes:
        tensors: The structures.
        whole: Whether no tensor is a shard of a parameter.
        chunks: Number of chunks of all tensors.
        parts: [chunks or more, COLUMNS], for the chunks.
        columns: [N, COLUMNS], for the tensors.
        sizes: [N, 2], for how far each moved.
        rows: The rows of `clip_stats` of the last step, and where they are.
        row_pointers: The same for C.
    """

    tensors: ctypes.Array[TensorStruct]
    whole: bool
    chunks: int
    parts: Tensor
    columns: Tensor
    sizes: Tensor
    rows: list[tuple[Tensor, Place]] = field(default_factory=list)
    row_pointers: ctypes.Array[ctypes.c_void_p] | None = None


def prepare(group: TensorGroup) -> Prepared:
    """Return the tensors of a group for the C code, which may be those of the last step. See `Plan`."""
    if group.prepared is None:
        count = len(group.locals)
        tensors = (TensorStruct * count)(*map(_struct, group.locals))
        chunks = sum(map(_chunks, tensors))
        parts, columns = _buffer(chunks, len(COLUMNS)), _buffer(count, len(COLUMNS))
        group.prepared = Prepared(tensors, not group.process_groups, chunks, parts, columns, _buffer(count, 2))
    prepared: Prepared = group.prepared
    return prepared


def replace_tensor(group: TensorGroup, number: int) -> None:
    """Describe a tensor of a group to the C code again."""
    prepared, struct = prepare(group), _struct(group.locals[number])
    prepared.chunks += _chunks(struct) - _chunks(prepared.tensors[number])
    if prepared.chunks > len(prepared.parts):
        prepared.parts = _buffer(prepared.chunks, len(COLUMNS))
    prepared.tensors[number] = struct


def _chunks(struct: TensorStruct) -> int:
    chunks: int = -(-struct.size // CHUNK)
    return chunks


def _struct(local: LocalParam) -> TensorStruct:
    """Return one tensor as the C code sees it."""
    total, moment = _state(local)
    return TensorStruct(
        local.weight.data_ptr(),
        local.grad.data_ptr(),
        total.data_ptr(),
        None if moment is None else moment.data_ptr(),
        None if moment is None else local.state["step"].data_ptr(),
        None if local.rows is None else local.rows.data_ptr(),
        max(1, local.weight.shape[1:].numel()),  # C divides by it
        local.weight.numel(),
        local.weight.dtype == torch.float64,
    )


def _step(group: TensorGroup, ok: Tensor | None, sizes: Tensor | None) -> tuple[SettingsStruct, Tensor | None]:
    """Take the step of a group, and fill `sizes` [N, 2] with how far each tensor moved. Return settings and sigma."""
    prepared = prepare(group)
    settings: SettingsStruct = group.scratch or _settings(group, ())
    parts = None if sizes is None else prepared.parts
    sigma = None if group.sigma is None else group.sigma.double().contiguous()
    _call("optim_step", prepared, settings, sigma, _lr(group), ok, parts, sizes)
    # Autograd must know that these were written to, as after any in-place operation.
    torch.autograd.graph.increment_version([local.weight for local in group.locals])
    for local in group.locals:
        if local.rows is not None:
            local.write_back()
    return settings, sigma


def _holds_a_row(row: Tensor) -> bool:
    return is_plain(row) and row.is_cpu and row.dtype == torch.float64 and row.shape == _ROW and row.is_contiguous()


def _is_known(row: Tensor, known: tuple[Tensor, Place]) -> bool:
    return row is known[0] and is_at(row, known[1])


def _settings(group: TensorGroup, reductions: Sequence[Reduction]) -> SettingsStruct:
    given, update = group.settings, group.locals[0].update
    bounds = [reduction.bound(given) for reduction in reductions if reduction.bound is not None]
    relative, absolute, accumulator = bounds[0] if bounds else NO_BOUND
    wanted = {reduction.kernel for reduction in reductions}
    joins, decay = decays_update(update), coupled_decay(given)
    beta1, beta2 = given["betas"] if isinstance(update, Adam) else (0.0, 0.0)
    return SettingsStruct(
        sign=-1.0 if given["maximize"] else 1.0,
        decay=0.0 if joins else decay,
        eps=given["eps"],
        bound_rel=relative,
        bound_abs=absolute,
        bound_acc=accumulator,
        shrink=given["weight_decay"] - decay,
        joined=decay if joins else 0.0,
        beta1=beta1,
        beta2=beta2,
        delayed=isinstance(update, Adagrad) and update.delayed,
        inside=isinstance(update, Adagrad) and update.epsilon_inside,
        clips_gradient=group.clips_gradient,
        feeds_clipped=group.method.feeds_clipped(given),
        grads="grad_norm" in wanted,
        weights="weight_norm" in wanted,
        updates="update_norm" in wanted or "update_max" in wanted,
        largest="update_max" in wanted,
        overshoot="overshoot" in wanted,
    )


_Argument = Tensor | ctypes.c_double | ctypes.Array[ctypes.c_void_p] | None


def _call(name: str, prepared: Prepared, settings: SettingsStruct, *arguments: _Argument) -> None:
    library = load()
    assert library is not None, "takes() checked that the kernels are there"
    count, threads = ctypes.c_int64(len(prepared.tensors)), ctypes.c_int64(_threads())
    getattr(library, name)(prepared.tensors, count, ctypes.byref(settings), *map(_pointer, arguments), threads)


class _Team:
    """Whether OpenMP has started threads, which a fork does not copy. Waiting for them would last for ever."""

    started = False
    lost = False

    @classmethod
    def fork(cls) -> None:
        """Note in a child process that the threads of its parent are not there."""
        cls.lost = cls.started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Team.fork)


def _threads() -> int:
    if _Team.lost:
        return 1
    threads = torch.get_num_threads()
    _Team.started |= threads > 1
    return threads


def _lr(group: TensorGroup) -> Tensor | ctypes.c_double:
    """Return the learning rate where C can read it."""
    lr = group.settings["lr"]
    return lr.to(device="cpu", dtype=torch.float64) if isinstance(lr, Tensor) else ctypes.c_double(lr)


def _pointer(given: _Argument) -> Any:
    if isinstance(given, Tensor):
        return ctypes.c_void_p(given.data_ptr())
    return None if given is None else ctypes.byref(given)
