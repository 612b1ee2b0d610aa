"""Two ways to read rows and means of rows from an embedding weight: one for accelerators, one for the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """The same as ``by_bag`` by one gather, for the CPU.

    There the backward passes of the embedding kernels take several times as long as that of ``index_select``, and two
    of them would each fill a gradient as large as the table.
    """
    every = torch.cat([rows_BC.view(-1), values_N])
    found = F.embedding(every, weight, sparse=True) if sparse else weight.index_select(0, every)
    one_hot, items_ND = found.split([rows_BC.numel(), values_N.shape[0]])

    lengths = offsets.diff()
    lists = torch.arange(lengths.shape[0], device=offsets.device)
    owner_N = torch.repeat_interleave(lists, lengths, output_size=items_ND.shape[0])
    sums = items_ND.new_zeros(lengths.shape[0], items_ND.shape[1]).index_add(0, owner_N, items_ND)
    return one_hot.view(*rows_BC.shape, weight.shape[1]), sums / lengths.clamp(min=1).unsqueeze(1)
