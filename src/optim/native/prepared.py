"""What the C code is told of a batch: the structures of kernels.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.batch import Batch
from optim.methods.clippy import OVERSHOOT
from optim.reductions import GRAD_NORM, UPDATE_MAX, UPDATE_NORM, WEIGHT_NORM, Reduction
from optim.updates.adagrad import epsilon_inside, reads_previous
from optim.work import CHUNK, Work

COLUMNS = (GRAD_NORM, WEIGHT_NORM, UPDATE_NORM, UPDATE_MAX, OVERSHOOT)
"""In the order of the C code's columns, which hold the squares of norms."""
Bounds = tuple[Tensor, Tensor]
"""Lower bounds of G, one a PIECE, and which chunks have stale ones."""


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


@dataclass(slots=True)
class Prepared:
    """A batch as the C code is told of it, for both passes and for the steps to come.

    Attributes:
        tensors: One for every work.
        settings: Of their group.
        reductions: Which of them the settings ask for.
        parts: Room for what every chunk is reduced to.
        bounds: Of the accumulators, which `tensors` point to.
        versions: Of the accumulators, when their bounds were taken.
        reduced: What the first pass of this step made of every tensor; None where there was none.
    """

    tensors: ctypes.Array[_Tensor]
    settings: _Settings
    reductions: Sequence[Reduction]
    parts: Tensor
    bounds: list[Bounds | None]
    versions: list[int]
    reduced: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, reductions: Sequence[Reduction], bounds: list[Bounds | None]) -> Prepared:
        """Return it for a batch, with bounds of its accumulators where they are known."""
        return cls(
            tensors=(_Tensor * len(batch.works))(*map(_tensor, batch.works, bounds)),
            settings=_settings(batch, reductions),
            reductions=reductions,
            parts=torch.empty(max(1, sum(map(chunks_of, batch.works))), len(COLUMNS), dtype=torch.float64),
            bounds=bounds,
            versions=[work.state["sum"]._version for work in batch.works],
        )


def chunks_of(work: Work) -> int:
    """Return in how many chunks the C code takes a tensor."""
    return -(-work.weight.numel() // CHUNK)


def _tensor(work: Work, bounds: Bounds | None) -> _Tensor:
    weight, total = work.weight, work.state["sum"]
    floors, stale = (None, None) if bounds is None else (kept.data_ptr() for kept in bounds)
    wide = weight.dtype == torch.float64
    return _Tensor(weight.data_ptr(), work.grad.data_ptr(), total.data_ptr(), weight.numel(), wide, floors, stale)


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
