"""The backend that calls the C kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from optim.batch import Batch, Moved
from optim.methods.clippy import OVERSHOOT
from optim.native.library import load
from optim.native.prepared import COLUMNS, Bounds, Prepared, chunks_of
from optim.reductions import UPDATE_NORM, Reduction
from optim.updates import ADAGRAD
from optim.work import CHUNK, Work

_KNOWN = frozenset(COLUMNS)
_ASKING = frozenset((OVERSHOOT, UPDATE_NORM))
"""Reductions that are faster where a lower bound of G is known."""
PIECE = 128
"""Coordinates of G that share a lower bound; as in the C code."""


def is_available() -> bool:
    """Whether the kernels are there; compiles them at the first call."""
    return load() is not None


class Native:
    """Dense, contiguous float32 and float64 tensors on the CPU, stepped by Adagrad under the rules of this package."""

    def __init__(self) -> None:
        # By accumulator: where it lay and its version when last looked at, a lower bound of every PIECE, and of every
        # chunk whether that is worth renewing. A step of ours (no version counts it) makes G larger, never smaller.
        self._bounds = WeakTensorKeyDictionary()

    def takes(self, work: Work) -> bool:
        """Whether the kernels can step this tensor."""
        weight, grad = work.weight, work.grad
        total = work.state.get("sum", weight)
        return (
            work.method.update is ADAGRAD
            and weight.dtype in (torch.float32, torch.float64)
            and weight.dtype == grad.dtype == total.dtype
            and weight.is_cpu
            and grad.is_cpu
            and total.is_cpu
            and weight.is_contiguous()
            and grad.is_contiguous()
            and total.is_contiguous()
            and work.unit_dims is None
            and _KNOWN.issuperset(work.method.reductions)
            and not torch.compiler.is_compiling()
            and is_available()
        )

    def renew(self, batch: Batch) -> bool:
        """Take the gradients of the next step into a batch that was stepped before; False where anything else moved."""
        prepared: Prepared = batch.prepared
        for work, told, version in zip(batch.works, prepared.tensors, prepared.versions, strict=True):
            param, grad, total = work.param, work.param.grad, work.state["sum"]
            if (
                type(grad) is not Tensor  # none, or a DTensor
                or not _lies_at(param, told.weight, work)
                or not _lies_at(total, told.total, work)
                or total._version != version
                or grad.layout is not torch.strided
                or not grad.is_cpu
                or not _lies_at(grad, at := grad.data_ptr(), work)
            ):
                return False
            told.grad, work.grad = at, grad
        batch.sigma = batch.peaks = prepared.reduced = None
        return True

    def reduce(self, batch: Batch, reductions: Sequence[Reduction]) -> dict[str, Tensor]:
        """Reduce the local parts, in float64."""
        prepared = self._prepare(batch, reductions)
        out = torch.empty(len(batch.works), len(COLUMNS), dtype=torch.float64)
        # What Clippy's rule makes of an overshoot is 1 up to 1 / lr, which spares the search for the largest of those.
        lr = _lr(batch) if OVERSHOOT in reductions else None
        self._call("optim_reduce", prepared, lr, prepared.parts, out)
        prepared.reduced = out
        if OVERSHOOT in reductions:
            batch.peaks = partial(_peaks, prepared.parts, [chunks_of(work) for work in batch.works])
        columns = {reduction: out[:, COLUMNS.index(reduction)] for reduction in reductions}
        return {
            reduction.name: column.sqrt() if reduction.combine == "norm" else column
            for reduction, column in columns.items()
        }

    def finite(self, batch: Batch) -> Tensor:
        """Look at the gradients of those tensors of which the first pass has not shown it."""
        prepared = batch.prepared or self._prepare(batch, batch.method.reductions)
        finite = torch.empty(len(batch.works), dtype=torch.bool)
        self._call("optim_finite", prepared, prepared.reduced, finite)
        return finite

    def apply(self, batch: Batch, ok: Tensor | None, *, measure: bool) -> Moved | None:
        """Take the step."""
        prepared = batch.prepared or self._prepare(batch, batch.method.reductions)
        parts, out = None, None
        if measure:
            chunks = max(map(chunks_of, batch.works))
            parts, out = (torch.empty(max(1, rows), 2, dtype=torch.float64) for rows in (chunks, len(batch.works)))
        sigma = None if batch.sigma is None else batch.sigma.double().contiguous()
        self._call("optim_step", prepared, sigma, _lr(batch), ok, parts, out)
        # Autograd must know that these were written to, as after any in-place operation.
        torch.autograd.graph.increment_version([work.weight for work in batch.works])
        for work in batch.works:
            work.write_back()
        return None if out is None else Moved(largest=out[:, 1], norm=out[:, 0].sqrt())

    def _prepare(self, batch: Batch, reductions: Sequence[Reduction]) -> Prepared:
        """Return what the C code is told, made where it is missing or was made for other reductions."""
        if batch.prepared is None or batch.prepared.reductions != reductions:
            batch.prepared = Prepared.of(batch, reductions, [self._bounds_of(work) for work in batch.works])
        return batch.prepared

    def _call(self, name: str, prepared: Prepared, *arguments: Tensor | ctypes.c_double | None) -> None:
        library = load()
        assert library is not None, "takes() said that the kernels are there"
        tensors, pointers = prepared.tensors, map(_pointer, arguments)
        count, threads = ctypes.c_int64(len(tensors)), ctypes.c_int64(torch.get_num_threads())
        getattr(library, name)(tensors, count, ctypes.byref(prepared.settings), *pointers, threads)

    def _bounds_of(self, work: Work) -> Bounds | None:
        """Return lower bounds of G, and which are stale; None where they are not worth keeping, or nobody asks."""
        total = work.state["sum"]
        if total.numel() < CHUNK or work.rows is not None or work.groups or _ASKING.isdisjoint(work.method.reductions):
            return None
        kept = work.kept["sum"]
        now = (total.data_ptr(), kept._version)
        then, *bounds = self._bounds.get(kept, (None,))
        if then != now:
            library = load()
            assert library is not None, "takes() said that the kernels are there"
            floors = torch.empty(-(-total.numel() // PIECE), dtype=total.dtype)
            size, wide = ctypes.c_int64(total.numel()), ctypes.c_int64(total.dtype == torch.float64)
            library.optim_minima(ctypes.c_void_p(total.data_ptr()), size, wide, ctypes.c_void_p(floors.data_ptr()))
            bounds = [floors, torch.zeros(-(-total.numel() // CHUNK), dtype=torch.uint8)]
            self._bounds[kept] = (now, *bounds)
        return bounds[0], bounds[1]


NATIVE = Native()


def _lies_at(tensor: Tensor, place: int | None, work: Work) -> bool:
    """Whether a tensor lies there, the way that `takes` asks for, in the shape and type of the work's weight."""
    return (
        tensor.data_ptr() == (place or 0)  # ctypes reads a null pointer as None
        and tensor.is_contiguous()
        and tensor.shape == work.weight.shape
        and tensor.dtype is work.weight.dtype
    )


def _lr(batch: Batch) -> Tensor | ctypes.c_double:
    """Return the learning rate where C can read it."""
    lr = batch.settings["lr"]
    return lr.to(device="cpu", dtype=torch.float64) if isinstance(lr, Tensor) else ctypes.c_double(lr)


def _pointer(given: Tensor | ctypes.c_double | None) -> Any:
    if isinstance(given, Tensor):
        return ctypes.c_void_p(given.data_ptr())
    return None if given is None else ctypes.byref(given)


def _peaks(parts: Tensor, counts: Sequence[int]) -> list[Tensor | None]:
    """Return the overshoot chunk by chunk for every tensor; None where there is one chunk."""
    chunks = parts[: sum(counts), COLUMNS.index(OVERSHOOT)].split(counts)
    return [peaks if len(peaks) > 1 else None for peaks in chunks]
