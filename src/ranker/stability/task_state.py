"""One task as the detector sees it: its baseline, its last losses and AUC."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from ranker.stability.baseline import Baseline
from ranker.stability.detector_settings import DetectorSettings

_LN2 = math.log(2.0)


class TaskTrack:
    """State of one task.

    Attributes:
        name: name of the task.
        baseline: level and noise of its loss.
        excess: of the last loss, in thresholds; infinite where it was not finite.
        lasting: the same of the median of the last losses (``Baseline.lasting_excess``).
        moved_since: step since which the loss has been kept out of the baseline without a break; None if it is not.
        auc: last training AUC; nan for a regression.
        recent: last finite losses, newest last.
        now: last loss over the baseline.
        over_first: last loss over the very first.
    """

    def __init__(self, name: str, settings: DetectorSettings) -> None:
        self.name = name
        self.baseline = Baseline(settings)
        self._settings = settings
        self.excess = self.lasting = 0.0
        self.moved_since: int | None = None
        self.auc = math.nan
        self.recent: deque[float] = deque(maxlen=settings.settle)
        self.now = self.over_first = 1.0

    def see(self, step: int, loss: float, auc: float) -> None:
        """Takes a step's signals. A loss of exactly 0 says that no label was observed."""
        if not math.isnan(auc):
            self.auc = auc
        if loss == 0.0:
            return
        if math.isfinite(loss):
            self.recent.append(loss)
            self.excess = self.baseline.excess(loss)
            full = len(self.recent) == self.recent.maxlen
            self.lasting = self.baseline.lasting_excess(self._median()) if full else 0.0
            self.now = loss / self.baseline.level if self.baseline.level > 0 else 1.0
            self.over_first = loss / self.baseline.first if self.baseline.first > 0 else 1.0
        else:
            self.excess = self.now = self.over_first = math.inf
        if self.excess <= 0.5:
            self.moved_since = None
        elif self.moved_since is None:
            self.moved_since = step

    def learn(self, loss: float) -> None:
        """Lets the loss of a step at which no jump is open enter the baseline."""
        if loss != 0.0 and math.isfinite(loss):
            self.baseline.accept(loss)

    @property
    def ratio(self) -> float:
        """Median of the last losses over the baseline; 1 where nothing is known."""
        if not self.recent or not self.baseline.level > 0:
            return 1.0
        return self._median() / self.baseline.level

    @property
    def entropy(self) -> float:
        """Of the labels of a binary task, in nats: the level of its loss, which a sound model stays close to."""
        return min(self.baseline.level, _LN2) if self.baseline.level > 0 else _LN2

    def _median(self) -> float:
        return sorted(self.recent)[len(self.recent) // 2]

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "baseline": self.baseline.state(),
            "excess": [self.excess, self.lasting],
            "moved_since": self.moved_since,
            "auc": self.auc,
            "recent": list(self.recent),
            "now": [self.now, self.over_first],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from ``state()``."""
        self.baseline.load(state["baseline"])
        (self.excess, self.lasting), self.moved_since = state["excess"], state["moved_since"]
        self.auc, (self.now, self.over_first) = state["auc"], state["now"]
        self.recent = deque(state["recent"], maxlen=self._settings.settle)
