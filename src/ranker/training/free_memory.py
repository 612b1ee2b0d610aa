"""Gives free memory back to the system while a long run goes on."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable

EVERY = 20.0
"""Seconds between two times. One takes 20 to 80 ms of CPU for 200 MB."""


class FreeMemory:
    """Returns the free memory of the C library's heap, at most once in ``EVERY`` seconds for the whole process.

    Windows and row groups are blocks of some megabytes that come and go beside small ones that stay. glibc returns
    memory only from the end of its heap, so the heap of a run over 100 million rows grew for 5,000 steps, to half as
    much again as was in use. Other C libraries need no such call.
    """

    _last = time.monotonic()

    @classmethod
    def release(cls) -> None:
        """Returns it, if that is due."""
        now = time.monotonic()
        if now - cls._last >= EVERY:
            cls._last = now
            if (trim := _trim()) is not None:
                trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """``malloc_trim`` of glibc; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: on Windows there is no library of this name
        return None
