"""Huge pages for the optimizer's state, where the system has them.

Touched rows of a large table lie on as many pages. Where these have 4 KiB, every row is a miss of the page table's
cache beside that of the memory; where they have 2 MiB, hardly any is. Dense steps are faster by a few hundredths, too.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

HUGE = 1 << 21
"""Bytes of a huge page on x86-64, and on ARM where pages have 4 KiB; elsewhere a range aligned so does no harm."""


@functools.cache
def _madvise() -> Callable[[int, int], int] | None:
    """Return a function that asks for huge pages in (first byte, number of bytes); None where there are none to ask."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it
    if advice is None:
        return None
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    return lambda start, size: call(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(advice))


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Ask the system to put the memory of a tensor on the CPU in huge pages: when first written to, or in time.

    Only whole huge pages within the tensor are asked for, so that no memory is used that was not before. What becomes
    of it is the system's affair (/sys/kernel/mm/transparent_hugepage); a refusal changes nothing.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or not tensor.is_cpu or not tensor.is_contiguous():
        return
    size = tensor.numel() * tensor.element_size()
    if size < 2 * HUGE or (advise := _madvise()) is None:
        return
    start = -(-tensor.data_ptr() // HUGE) * HUGE
    end = (tensor.data_ptr() + size) // HUGE * HUGE
    advise(start, end - start)


def new_state(weight: Tensor, value: float) -> Tensor:
    """Return a tensor like a weight, filled with a number; in float32 where the weight's dtype is narrower."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    state = torch.empty_like(weight, dtype=dtype, memory_format=torch.preserve_format)
    ask_for_huge_pages(state)  # before anything is written
    return state.fill_(value)
