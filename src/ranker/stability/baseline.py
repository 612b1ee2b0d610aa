"""The level a loss comes from: robust statistics that a spike, a blow-up or a NaN cannot enter."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Any

from ranker.stability.detector_settings import DetectorSettings

_FEW = 16  # values that make a level


class Baseline:
    """Running level and noise of one task's loss.

        level = median of the last ``window`` accepted losses, rising by at most 2^(1 / max_rise) a step
        scale = max((q75 - q50) / 0.674, (q95 - q50) / 1.645), changing by at most 2^(8 / max_rise) a step
        threshold = max((jump_ratio - 1) level, jump_scales scale, jump_floor first)

    A median over a ring rather than a robust moving average: half of the accepted values would have to be wrong before
    it moves, it has no start-up bias, and it is exact again ``window`` steps after anything. The scale looks upward
    only, at two quantiles, because losses are skewed: with few positives a batch most steps lie on one level and some
    far above it. It changes slowly because a loss that grows leaves a ring of growing losses, which looks like noise.

    A loss more than half the threshold above the level stays out. Two things then need care. A level that fell (the
    loss improves fast early on) would leave old values in the ring: after 16 losses in a row below the median only
    these are kept. A level that rose a little for good would be kept out for ever: after ``window / 2`` losses in a row
    out it is let in, and the limit on rising keeps slow blow-ups from being taken for the same thing.
    """

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._rise = 2.0 ** (1.0 / settings.max_rise)
        self.first = math.nan  # the first finite loss, of the untrained model
        self.level = math.nan
        self.scale = 0.0  # robust standard deviation of the upper half of the ring
        self._ring: deque[float] = deque(maxlen=settings.window)
        self._sorted: list[float] = []
        self._below = 0
        self._out = 0

    def excess(self, loss: float) -> float:
        """Distance of a loss above the level in thresholds: above 1 it is high, above 0.5 it is kept out."""
        return self._over(loss, self._settings.jump_scales)

    def lasting_excess(self, median: float) -> float:
        """The same of the median of the last ``settle`` losses, a third as noisy.

        It sees the slowest blow-ups: growing losses that fill the ring look like noise there, but do not come back.
        """
        return self._over(median, self._settings.jump_scales / 3.0)

    def _over(self, loss: float, scales: float) -> float:
        if math.isnan(self.level):
            return 0.0
        s = self._settings
        threshold = max((s.jump_ratio - 1.0) * self.level, scales * self.scale, s.jump_floor * self.first)
        return (loss - self.level) / max(threshold, 1e-12)

    def accept(self, loss: float) -> None:
        """Takes a finite loss of a step at which no jump is open."""
        if math.isnan(self.first):
            self.first = self.level = loss
        self._out = self._out + 1 if self.excess(loss) > 0.5 else 0
        if 0 < self._out <= self._settings.window // 2:
            return
        self._below = self._below + 1 if self._sorted and loss < self._quantile(0.5) else 0
        self._push(loss)
        if self._below >= _FEW:
            self.restart(list(self._ring)[-_FEW:])
        median = self._quantile(0.5)
        # With few values the median is no level yet: only a fall counts.
        self.level = min(median, self.level * (self._rise if len(self._ring) >= _FEW else 1.0))
        self.scale = self._noise()

    def restart(self, losses: list[float]) -> None:
        """Forgets the past in favour of a new level."""
        self._ring.clear()
        self._ring.extend(losses)
        self._sorted = sorted(self._ring)
        self._below = self._out = 0
        if self._sorted:
            self.level = self._quantile(0.5)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "first": self.first,
            "level": self.level,
            "scale": self.scale,
            "ring": list(self._ring),
            "below": self._below,
            "out": self._out,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from ``state()``."""
        self._ring = deque(state["ring"], maxlen=self._settings.window)
        self._sorted = sorted(self._ring)
        self.first, self.level, self.scale = state["first"], state["level"], state["scale"]
        self._below, self._out = state["below"], state["out"]

    def _noise(self) -> float:
        if len(self._ring) < _FEW:
            return self.scale
        q50, q75, q95 = (self._quantile(q) for q in (0.5, 0.75, 0.95))
        now = max((q75 - q50) / 0.674, (q95 - q50) / 1.645, 1e-3 * q50)
        if not self.scale or len(self._ring) < self._settings.window // 2:
            return now
        change = self._rise**8
        return min(max(now, self.scale / change), self.scale * change)

    def _push(self, loss: float) -> None:
        if len(self._ring) == self._ring.maxlen:
            del self._sorted[bisect_left(self._sorted, self._ring[0])]
        self._ring.append(loss)
        insort(self._sorted, loss)

    def _quantile(self, q: float) -> float:
        return self._sorted[min(int(q * len(self._sorted)), len(self._sorted) - 1)]
