"""Finding the few that matter with few questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def halve(items: Sequence[T], enough: Callable[[Sequence[T]], bool]) -> list[T]:
    """A small part of the items that is enough, found by halving; empty where neither half of them is.

    The first item is tried alone before anything else, so that a good order saves questions. Where neither half of a
    part that is enough is enough itself, both are needed and the search ends. All items together are not tried.

    Args:
        items: the most suspicious first.
        enough: whether a part is.
    """
    left, found = list(items), []
    if left and enough(left[:1]):
        return left[:1]
    while len(left) > 1:
        middle = (len(left) + 1) // 2
        half = next((part for part in (left[:middle], left[middle:]) if enough(part)), None)
        if half is None:
            break
        left = found = half
    return found


def halve_questions(items: int) -> int:
    """The most questions that ``halve`` asks."""
    return 1 + 2 * math.ceil(math.log2(items)) if items > 1 else 1


def smallest_prefix(size: int, enough: Callable[[int], bool]) -> int | None:
    """The smallest k up to ``size`` for which the first k items are enough; None where not even all are.

    Doubles k until it is enough and then closes in from both sides, taking for granted that more items are enough
    where fewer are.
    """
    low, high = 0, 1  # the first low are not enough
    while not enough(high):
        if high >= size:
            return None
        low, high = high, min(2 * high, size)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def prefix_questions(size: int) -> int:
    """The most questions that ``smallest_prefix`` asks."""
    return 1 + 2 * math.ceil(math.log2(size)) if size > 1 else 1
