"""Which coordinate decided sigma, and which term of its bound was the largest there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optim.distributed import shard_offsets
from optim.eager import coordinates
from optim.reductions import Coordinates
from optim.work import CHUNK, Piece, Work

TERMS = ("relative", "absolute", "accumulator")


class Place(NamedTuple):
    """0-d tensors: the binding reduction's largest value, at which local flat index, which term, and whether w = 0."""

    value: Tensor
    at: Tensor
    term: Tensor
    still: Tensor


def locate(work: Work, peaks: Tensor | None) -> Place:
    """Find the coordinate with the largest value of the method's binding reduction, local part only.

    When the reduction was taken in pieces (`peaks`), only the piece with the maximum is looked at again.
    """
    binding, terms = work.method.binding, work.method.terms
    assert binding is not None, "only methods with a binding coordinate are asked"
    assert terms is not None, "a binding coordinate comes with the terms of its bound"
    if work.weight.numel() == 0:
        nothing = work.weight.new_full((), -1.0)
        return Place(nothing + 1, nothing.long(), nothing, nothing)
    piece, start = _peak_piece(work, peaks)
    at = coordinates(work, piece)
    value, index = binding.map(at, work.settings).flatten().max(dim=0)
    weight, grad, update = (torch.take(tensor, index) for tensor in at[:3])
    there = Coordinates(weight, grad, update, None if at.scale is None else torch.take(at.scale, index))
    sizes = terms(there, work.settings)
    term = torch.stack([sizes[name] for name in TERMS if name in sizes]).argmax()
    return Place(value, start + index, term, there.weight == 0)


def _peak_piece(work: Work, peaks: Tensor | None) -> tuple[Piece, Tensor | int]:
    """Return the piece with the largest value, chosen on the device, and the flat index it starts at."""
    if peaks is None:
        return Piece(work.weight, work.grad, work.state), 0
    start = peaks.argmax() * CHUNK
    window = (start + torch.arange(CHUNK, device=start.device)).clamp_(max=work.weight.numel() - 1)

    def cut(tensor: Tensor) -> Tensor:
        return tensor.view(-1).index_select(0, window) if tensor.ndim else tensor

    return Piece(cut(work.weight), cut(work.grad), {key: cut(value) for key, value in work.state.items()}), start


def global_index(work: Work, index: Tensor) -> Tensor:
    """Return the flat index in the whole parameter of a flat index among its touched rows or in its local shard."""
    param, rows, shape = work.param, work.rows, work.param.shape
    if rows is not None:
        width = max(1, shape[1:].numel())
        return (
            rows.index_select(0, (index // width).view(1)).view(()) * width + index % width if rows.numel() else index
        )
    local = shard_offsets(param)
    if local is None:
        return index
    local_shape, offsets = local
    result, stride = torch.zeros_like(index), 1
    for size, local_size, offset in zip(reversed(shape), reversed(local_shape), reversed(offsets), strict=True):
        result += (index % max(1, local_size) + offset) * stride
        index = index // max(1, local_size)
        stride *= size
    return result
