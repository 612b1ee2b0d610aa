"""The structures that are passed to the C kernels, field by field as kernels.c has them."""

from __future__ import annotations

import ctypes

from optim.stats import FIELDS


class TensorStruct(ctypes.Structure):
    """`Tensor` of kernels.c: one tensor with its gradient and state."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("moment", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("is_double", ctypes.c_int64),
    )


class SettingsStruct(ctypes.Structure):
    """`Settings` of kernels.c: what all tensors of a group have in common."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("sign", "decay", "eps", "bound_rel", "bound_abs", "bound_acc")),
        *((name, ctypes.c_double) for name in ("shrink", "joined", "beta1", "beta2")),
        *((name, ctypes.c_int64) for name in ("delayed", "inside", "clips_gradient", "feeds_clipped")),
        *((name, ctypes.c_int64) for name in ("grads", "weights", "updates", "largest", "overshoot")),
    )


LAYOUT = (ctypes.sizeof(TensorStruct) * 10_000 + ctypes.sizeof(SettingsStruct)) * 100 + len(FIELDS)
"""What `optim_layout` returns. A library of another version of the sources would read beyond these structures."""
