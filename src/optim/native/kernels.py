"""The backend that calls the C kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from optim.batch import Batch, Moved
from optim.methods.clippy import OVERSHOOT
from optim.native.library import load
from optim.reductions import GRAD_NORM, UPDATE_MAX, UPDATE_NORM, WEIGHT_NORM, Reduction
from optim.updates import ADAGRAD
from optim.updates.adagrad import epsilon_inside, reads_previous
from optim.work import CHUNK, Work

_COLUMNS = (GRAD_NORM, WEIGHT_NORM, UPDATE_NORM, UPDATE_MAX, OVERSHOOT)
"""In the order of the C code's columns, which hold the squares of norms."""
_KNOWN = frozenset(_COLUMNS)
_ASKING = frozenset((OVERSHOOT, UPDATE_NORM))
"""Reductions that are faster where a lower bound of G is known."""
PIECE = 128
"""Coordinates of G that share a lower bound; as in the C code."""


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("wide", ctypes.c_int64),
        ("floors", ctypes.c_void_p),
        ("stale", ctypes.c_void_p),
    )


class _Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("sign", "decay", "eps", "lambda_rel", "lambda_abs", "lambda_acc")),
        ("shrink", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("delayed", "inside", "clips_gradient", "feeds_clipped")),
        *((name, ctypes.c_int64) for name in ("grads", "weights", "updates", "largest", "overshoot")),
    )


def is_available() -> bool:
    """Whether the kernels are there; compiles them at the first call."""
    return load() is not None


class Native:
    """Dense, contiguous float32 and float64 tensors on the CPU, stepped by Adagrad under the rules of this package."""

    def __init__(self) -> None:
        # By accumulator: its version when last looked at, a lower bound of every PIECE, and of every chunk whether that
        # is worth renewing. A step of ours (which does not count as a version) makes G larger, never smaller.
        self._floors = WeakTensorKeyDictionary()

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

    def reduce(self, batch: Batch, reductions: Sequence[Reduction]) -> dict[str, Tensor]:
        """Reduce the local parts, in float64."""
        works = batch.works
        counts = [-(-work.weight.numel() // CHUNK) for work in works]
        parts = torch.empty(max(1, sum(counts)), len(_COLUMNS), dtype=torch.float64)
        out = torch.empty(len(works), len(_COLUMNS), dtype=torch.float64)
        # What Clippy's rule makes of an overshoot is 1 up to 1 / lr, which spares the search for the largest of those.
        lr = _lr(batch) if OVERSHOOT in reductions else None
        self._call("optim_reduce", batch, reductions, lr, parts, out)
        if OVERSHOOT in reductions:
            batch.peaks = partial(_peaks, parts, counts)
        columns = dict(zip(_COLUMNS, out.unbind(dim=1), strict=True))
        return {
            reduction.name: columns[reduction].sqrt() if reduction.combine == "norm" else columns[reduction]
            for reduction in reductions
        }

    def apply(self, batch: Batch, ok: Tensor | None, *, measure: bool) -> Moved | None:
        """Take the step."""
        parts, out = None, None
        if measure:
            chunks = max(-(-work.weight.numel() // CHUNK) for work in batch.works)
            parts, out = (torch.empty(max(1, rows), 2, dtype=torch.float64) for rows in (chunks, len(batch.works)))
        sigma = None if batch.sigma is None else batch.sigma.double().contiguous()
        self._call("optim_step", batch, (), sigma, _lr(batch), ok, parts, out)
        # Autograd must know that these were written to, as after any in-place operation.
        torch.autograd.graph.increment_version([work.weight for work in batch.works])
        for work in batch.works:
            work.write_back()
        return None if out is None else Moved(largest=out[:, 1], norm=out[:, 0].sqrt())

    def _call(self, name: str, batch: Batch, reductions: Sequence[Reduction], *arguments: Tensor | None) -> None:
        library = load()
        assert library is not None, "takes() said that the kernels are there"
        if batch.prepared is None:  # the step asks for no reductions, and does not mind those of the pass before
            tensors = (_Tensor * len(batch.works))(*map(self._tensor, batch.works))
            batch.prepared = tensors, _settings(batch, reductions)
        tensors, settings = batch.prepared
        pointers = [None if given is None else ctypes.c_void_p(given.data_ptr()) for given in arguments]
        count, threads = ctypes.c_int64(len(batch.works)), ctypes.c_int64(torch.get_num_threads())
        getattr(library, name)(tensors, count, ctypes.byref(settings), *pointers, threads)

    def _tensor(self, work: Work) -> _Tensor:
        total, wide = work.state["sum"], work.weight.dtype == torch.float64
        bounds = self._bounds_of(work)
        floors, stale = (None, None) if bounds is None else (kept.data_ptr() for kept in bounds)
        return _Tensor(
            work.weight.data_ptr(), work.grad.data_ptr(), total.data_ptr(), work.weight.numel(), wide, floors, stale
        )

    def _bounds_of(self, work: Work) -> tuple[Tensor, Tensor] | None:
        """Return lower bounds of G, and which are stale; None where they are not worth keeping, or nobody asks."""
        total = work.state["sum"]
        if total.numel() < CHUNK or work.rows is not None or work.groups or _ASKING.isdisjoint(work.method.reductions):
            return None
        kept = work.kept["sum"]
        version, *bounds = self._floors.get(kept, (-1,))
        if version != kept._version:
            library = load()
            assert library is not None, "takes() said that the kernels are there"
            floors = torch.empty(-(-total.numel() // PIECE), dtype=total.dtype)
            size, wide = ctypes.c_int64(total.numel()), ctypes.c_int64(total.dtype == torch.float64)
            library.optim_minima(ctypes.c_void_p(total.data_ptr()), size, wide, ctypes.c_void_p(floors.data_ptr()))
            bounds = [floors, torch.zeros(-(-total.numel() // CHUNK), dtype=torch.uint8)]
            self._floors[kept] = (kept._version, *bounds)
        return bounds[0], bounds[1]


NATIVE = Native()


def _lr(batch: Batch) -> Tensor:
    """Return the learning rate where C can read it, 0-d float64."""
    return torch.as_tensor(batch.settings["lr"], dtype=torch.float64)


def _settings(batch: Batch, reductions: Sequence[Reduction]) -> _Settings:
    given = batch.settings
    return _Settings(
        sign=-1.0 if given["maximize"] else 1.0,
        decay=0.0 if given["decoupled_weight_decay"] else given["weight_decay"],
        eps=given["eps"],
        lambda_rel=given.get("lambda_rel", 0.0),
        lambda_abs=given.get("lambda_abs", 0.0),
        lambda_acc=given.get("lambda_acc", 0.0),
        shrink=given["weight_decay"] if given["decoupled_weight_decay"] else 0.0,
        delayed=reads_previous(given),
        inside=epsilon_inside(given),
        clips_gradient=batch.clips_gradient,
        feeds_clipped=given.get("clip_accumulator", False),
        grads=GRAD_NORM in reductions,
        weights=WEIGHT_NORM in reductions,
        updates=UPDATE_NORM in reductions or UPDATE_MAX in reductions,
        largest=UPDATE_MAX in reductions,
        overshoot=OVERSHOOT in reductions,
    )


def _peaks(parts: Tensor, counts: Sequence[int]) -> list[Tensor | None]:
    """Return the overshoot chunk by chunk for every tensor; None where there is one chunk."""
    chunks = parts[: sum(counts), _COLUMNS.index(OVERSHOOT)].split(counts)
    return [peaks if len(peaks) > 1 else None for peaks in chunks]
