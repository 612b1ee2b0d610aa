"""Values over steps, and how a long series is made short without losing its peaks."""

from __future__ import annotations

import math
from typing import NamedTuple


class Series(NamedTuple):
    """Values over steps, in order; may contain nan and infinity."""

    steps: list[int]
    values: list[float]


def thinned(series: Series, bins: int) -> Series:
    """Reduces a series to the smallest and the largest value per bin of steps, so that every peak is kept.

    Of the values in a bin that are not finite, the first is kept too.
    """
    if len(series.steps) <= 2 * bins:
        return series
    first, width = series.steps[0], max(1, series.steps[-1] - series.steps[0] + 1)
    stretches: dict[int, list[int]] = {}
    for i, step in enumerate(series.steps):
        stretches.setdefault((step - first) * bins // width, []).append(i)
    kept: list[int] = []
    for places in stretches.values():
        finite = [i for i in places if math.isfinite(series.values[i])]
        chosen = (
            {min(finite, key=series.values.__getitem__), max(finite, key=series.values.__getitem__)}
            if finite
            else set()
        )
        chosen |= set([i for i in places if not math.isfinite(series.values[i])][:1])
        kept += sorted(chosen)
    return Series([series.steps[i] for i in kept], [series.values[i] for i in kept])
