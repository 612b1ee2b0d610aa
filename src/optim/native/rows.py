"""Touched rows of large tables, copied out and back by a kernel that asks for them ahead of time."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from optim.native.library import load


class _Rows(ctypes.Structure):
    _fields_ = (("table", ctypes.c_void_p), ("copy", ctypes.c_void_p), ("bytes", ctypes.c_int64))


def moves_rows(tables: Sequence[Tensor], rows: Tensor) -> bool:
    """Whether the kernel can move rows of these tables."""
    return (
        not torch.compiler.is_compiling()
        and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (*tables, rows))
        and load() is not None
    )


def gather_rows(tables: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Return copies of the rows of every table, as `index_select`.

    Raises:
        IndexError: a row is outside of the tables.
    """
    copies = [table.new_empty((len(rows), *table.shape[1:])) for table in tables]
    _move(tables, copies, rows, back=False)
    return copies


def scatter_rows(tables: Sequence[Tensor], copies: Sequence[Tensor], rows: Tensor) -> None:
    """Write copies of rows back into their tables, as `index_copy_`.

    Raises:
        IndexError: a row is outside of the tables; nothing has been written.
    """
    _move(tables, copies, rows, back=True)
    torch.autograd.graph.increment_version(tables)


def _move(tables: Sequence[Tensor], copies: Sequence[Tensor], rows: Tensor, *, back: bool) -> None:
    library = load()
    assert library is not None, "moves_rows() said that the kernels are there"
    height, numbers = len(tables[0]), (ctypes.c_int64(value) for value in (back, torch.get_num_threads()))
    pairs = (
        _Rows(table.data_ptr(), copy.data_ptr(), table.shape[1:].numel() * table.element_size())
        for table, copy in zip(tables, copies, strict=True)
    )
    count, n = ctypes.c_int64(len(tables)), ctypes.c_int64(len(rows))
    array, index = (_Rows * len(tables))(*pairs), ctypes.c_void_p(rows.data_ptr())
    library.optim_move_rows.restype = ctypes.c_int64
    if library.optim_move_rows(array, count, index, n, ctypes.c_int64(height), *numbers):
        raise IndexError(f"a sparse gradient has a row outside of its table of {height} rows")
