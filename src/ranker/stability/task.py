"""One task as the detector sees it: its baseline, its last losses, how well it has learned."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from ranker.stability.baseline import Baseline
from ranker.stability.settings import DetectorSettings

_LN2 = math.log(2.0)


class TaskTrack:
    """State of one task.

    Attributes:
        name: name of the task.
        baseline: level and noise of its loss.
        excess: of the last loss, in thresholds; infinite where it was not finite.
        moved_since: step since which the loss has been kept out of the baseline without a break; None if it is not.
        auc: last training AUC; nan for a regression.
        learned: whether the AUC was clearly above 0.5 for half of ``auc_patience`` in a row, once.
        best_auc: highest AUC since then; 0.5 before.
        recent: last finite losses, newest last.
    """

    def __init__(self, name: str, settings: DetectorSettings) -> None:
        self.name = name
        self.baseline = Baseline(settings)
        self._settings = settings
        self.excess = 0.0
        self.moved_since: int | None = None
        self.auc = math.nan
        self.best_auc = 0.5
        self.learned = False
        self._clear = 0
        self.recent: deque[float] = deque(maxlen=settings.settle)

    def see(self, step: int, loss: float, auc: float) -> None:
        """Takes a step's signals. A loss of exactly 0 says that no label was observed."""
        if not math.isnan(auc):
            self.auc = auc
        if loss == 0.0:
            return
        if math.isfinite(loss):
            self.recent.append(loss)
            self.excess = self.baseline.excess(loss)
        else:
            self.excess = math.inf
        if self.excess <= 0.5:
            self.moved_since = None
        elif self.moved_since is None:
            self.moved_since = step

    def learn_level(self, loss: float) -> None:
        """Lets the loss of a step at which no jump is open enter the baseline."""
        if loss != 0.0 and math.isfinite(loss):
            self.baseline.accept(loss)

    def learn_auc(self) -> None:
        """Notes a step's AUC: a task has learned once it lies clearly above 0.5 for long enough to be no accident."""
        clear = self.auc > 0.5 + 1.5 * self.tolerance
        self._clear = self._clear + 1 if clear else 0
        if self._clear >= self._settings.auc_patience // 2:
            self.learned = True
            self.best_auc = max(self.auc, self.best_auc)

    @property
    def ratio(self) -> float:
        """Median of the last losses over the baseline; 1 where nothing is known."""
        if not self.recent or not self.baseline.level > 0:
            return 1.0
        return sorted(self.recent)[len(self.recent) // 2] / self.baseline.level

    @property
    def tolerance(self) -> float:
        """How far from 0.5 an AUC of this task may lie and still say nothing.

        The standard deviation of an AUC goes with 1 / sqrt(positives). How rare they are is read off the loss, which
        for a sound model is close to the entropy of the share p of positives: p = H / (1 - ln H) within a third for
        small p.
        """
        entropy = min(self.baseline.level, _LN2) if self.baseline.level > 0 else _LN2
        share = entropy / (1.0 - math.log(entropy))
        return self._settings.auc_tolerance * max(1.0, math.sqrt(0.02 / share))

    def says_nothing(self, auc: float) -> bool:
        """Whether an AUC is as good as 0.5, or undefined."""
        return math.isnan(auc) or auc < 0.5 + self.tolerance

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "baseline": self.baseline.state(),
            "excess": self.excess,
            "moved_since": self.moved_since,
            "auc": self.auc,
            "best_auc": self.best_auc,
            "learned": self.learned,
            "clear": self._clear,
            "recent": list(self.recent),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from ``state()``."""
        self.baseline.load(state["baseline"])
        self.excess, self.moved_since = state["excess"], state["moved_since"]
        self.auc, self.best_auc = state["auc"], state["best_auc"]
        self.learned, self._clear = state["learned"], state["clear"]
        self.recent = deque(state["recent"], maxlen=self._settings.settle)
