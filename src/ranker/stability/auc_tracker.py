"""Whether the AUCs of all tasks together are above chance now, and whether they were earlier in the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.task_state import TaskState


@dataclass
class Streak:
    """Consecutive steps at which a condition holds.

    Attributes:
        length: number of steps.
        since: first of them.
    """

    length: int = 0
    since: int = 0

    def update(self, step: int, holds: bool) -> int:
        """Adds a step, and returns the length."""
        if holds and not self.length:
            self.since = step
        self.length = self.length + 1 if holds else 0
        return self.length


def auc_above_chance(tasks: Sequence[TaskState], aucs: Sequence[float], settings: DetectorSettings) -> float:
    """By how much the AUCs exceed 0.5, as one number; nan where all AUCs are nan.

        sum_t H_t (AUC_t - 0.5) / sum_t H_t        over binary tasks; H_t entropy of the labels

    With few positives an AUC is noisy (standard deviation about 0.29 / sqrt(positives)), and the predictions of a lost
    model correlate with some rare label now and then. The weights therefore favour tasks with many positives. One
    task far above 0.5 is enough by itself, so that a model whose common tasks cannot be learned does not count as lost:
    by 0.1, or more for a rare task. With p the share of positives, H is about p (1 - ln p), and p = H / (1 - ln H)
    within a third.
    """
    weighted = total = best = 0.0
    for task, auc in zip(tasks, aucs, strict=True):
        if math.isnan(auc):
            continue
        entropy = task.entropy
        weighted += entropy * (auc - 0.5)
        total += entropy
        positives = entropy / (1.0 - math.log(entropy))
        enough_alone = 5.0 * settings.auc_tolerance * max(1.0, math.sqrt(0.02 / positives))
        if auc - 0.5 > enough_alone:
            best = max(best, auc - 0.5)
    return max(weighted / total, best) if total else math.nan


class AucTracker:
    """Tracks ``auc_above_chance`` over the steps.

    Attributes:
        learned: whether it once was clearly above the tolerance for ``auc_patience / 2`` consecutive steps.
        best: highest value since then.
        at_chance: consecutive steps at which it is near 0, or far below the best value.
    """

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self.learned = False
        self.best = 0.0
        self.at_chance = Streak()
        self._clearly_above = Streak()

    def update(self, step: int, value: float) -> None:
        """Takes ``auc_above_chance`` of a step; nan changes nothing."""
        if math.isnan(value):
            return
        tolerance = self._settings.auc_tolerance
        if self._clearly_above.update(step, value > 1.5 * tolerance) >= self._settings.auc_patience // 2:
            self.learned = True
            self.best = max(self.best, value)
        self.at_chance.update(step, value < max(tolerance, 0.2 * self.best))

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers."""
        return {
            "learned": self.learned,
            "best": self.best,
            "at_chance": asdict(self.at_chance),
            "clearly_above": asdict(self._clearly_above),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()``."""
        self.learned, self.best = state["learned"], state["best"]
        self.at_chance, self._clearly_above = Streak(**state["at_chance"]), Streak(**state["clearly_above"])
