"""Two ways to read rows and means of rows from an embedding weight: one for accelerators, one for the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NARROW = 8
"""Widest rows that are added number by number: 36,864 of 8 take 0.20 ms, not 0.54, of 16 0.35, not 0.29."""


def by_bag(
    weight: Tensor, rows_BC: Tensor, values_N: Tensor, offsets: Tensor, *, sparse: bool
) -> tuple[Tensor, Tensor]:
    """Looks rows and lists up with torch's embedding kernels, whose gradients on a GPU do not vary from run to run.

    Returns:
        The rows, [B, C, D], and the mean of each list, [lists, D], 0 where it is empty.
    """
    one_hot = F.embedding(rows_BC, weight, sparse=sparse)
    return one_hot, F.embedding_bag(values_N, weight, offsets, mode="mean", sparse=sparse, include_last_offset=True)


def by_gather(
    weight: Tensor, rows_BC: Tensor, values_N: Tensor, offsets: Tensor, *, sparse: bool
) -> tuple[Tensor, Tensor]:
    """The same as ``by_bag`` for the CPU.

    There the backward passes of the embedding kernels take several times as long as ``index_add``, and two of them
    would each fill a gradient as large as the table.
    """
    if not sparse and not torch.compiler.is_compiling():
        one_hot, means = _RowsAndMeans.apply(weight, rows_BC.reshape(-1), values_N, offsets)
        return one_hot.view(*rows_BC.shape, weight.shape[1]), means
    every = torch.cat([rows_BC.view(-1), values_N])
    found = F.embedding(every, weight, sparse=True) if sparse else weight.index_select(0, every)
    one_hot, items_ND = found.split([rows_BC.numel(), values_N.shape[0]])
    sums = items_ND.new_zeros(offsets.shape[0] - 1, items_ND.shape[1]).index_add(
        0, _owners(offsets, values_N), items_ND
    )
    return one_hot.view(*rows_BC.shape, weight.shape[1]), sums / _sizes(offsets)


class _RowsAndMeans(torch.autograd.Function):
    """torch's kernel for the means of lists, which never holds the lists' rows, with a backward of our own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows_M: Tensor, values_N: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows_M, values_N, offsets)
        ctx.shape = weight.shape
        rows_MD = weight.index_select(0, rows_M)
        if not values_N.shape[0]:
            return rows_MD, weight.new_zeros(offsets.shape[0] - 1, weight.shape[1])
        return rows_MD, F.embedding_bag(values_N, weight, offsets, mode="mean", include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows_M, values_N, offsets), (grad_MD, grad_LD) = ctx.saved_tensors, grads
        items_ND = (grad_LD / _sizes(offsets)).index_select(0, _owners(offsets, values_N))
        zeros = grad_MD.new_zeros(ctx.shape)
        if torch.is_grad_enabled():  # for second derivatives
            return zeros.index_add(0, rows_M, grad_MD).index_add(0, values_N, items_ND), None, None, None
        return _add_rows(_add_rows(zeros, rows_M, grad_MD), values_N, items_ND), None, None, None


def _add_rows(table: Tensor, rows_N: Tensor, values_ND: Tensor) -> Tensor:
    """``table.index_add_(0, rows_N, values_ND)``, in the order of the rows.

    On the CPU torch sorts the rows of a matrix first, which takes longer than adding narrow ones. A flat tensor it adds
    to number by number, as they come; seen as complex numbers, two at a time.
    """
    dim = table.shape[1]
    if dim % 2 or dim > _NARROW or table.dtype != torch.float32 or not table.is_contiguous():
        return table.index_add_(0, rows_N, values_ND)
    pairs = dim // 2
    place_NP = rows_N.unsqueeze(1) * pairs + torch.arange(pairs)
    added = values_ND.contiguous()
    if added.storage_offset() % 2:  # of a single row, behind others: complex numbers begin at even places
        added = added.clone()
    flat, added = (torch.view_as_complex(x.view(-1, 2)) for x in (table, added))
    flat.scatter_add_(0, place_NP.view(-1), added)
    return table


def _owners(offsets: Tensor, values_N: Tensor) -> Tensor:
    """Which list each value belongs to, int64 [N]."""
    lengths = offsets.diff()
    lists = torch.arange(lengths.shape[0], device=offsets.device)
    return torch.repeat_interleave(lists, lengths, output_size=values_N.shape[0])


def _sizes(offsets: Tensor) -> Tensor:
    """What the sum of each list is divided by, [lists, 1]; 1 where it is empty."""
    return offsets.diff().clamp(min=1).unsqueeze(1)
