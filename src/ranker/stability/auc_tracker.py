"""What the AUCs of all tasks say together: whether the model knows anything, and whether it once did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.task_state import TaskTrack


@dataclass
class Streak:
    """Steps in a row that something has been so.

    Attributes:
        length: how many.
        since: the first of them.
    """

    length: int = 0
    since: int = 0

    def count(self, step: int, holds: bool) -> int:
        """Adds a step."""
        if holds and not self.length:
            self.since = step
        self.length = self.length + 1 if holds else 0
        return self.length


def skill(tasks: Sequence[TaskTrack], aucs: Sequence[float], settings: DetectorSettings) -> float:
    """How far the AUCs lie above 0.5, as one number; nan without any.

        skill = sum_t H_t (AUC_t - 0.5) / sum_t H_t        over binary tasks; H_t entropy of the labels

    Few positives make a noisy AUC (standard deviation about 0.29 / sqrt(positives)), and a lost model's predictions
    still go with some rare label now and then; the weights let the tasks that can tell speak. One task far above 0.5
    settles it alone, so that a model whose common tasks cannot be learned is not taken for lost: by 0.1, or more
    where it is rare. With p the share of positives, H is about p (1 - ln p), and p = H / (1 - ln H) within a third.
    """
    weighted = total = best = 0.0
    for task, auc in zip(tasks, aucs, strict=True):
        if math.isnan(auc):
            continue
        entropy = task.entropy
        weighted += entropy * (auc - 0.5)
        total += entropy
        positives = entropy / (1.0 - math.log(entropy))
        clear = 5.0 * settings.auc_tolerance * max(1.0, math.sqrt(0.02 / positives))
        if auc - 0.5 > clear:
            best = max(best, auc - 0.5)
    return max(weighted / total, best) if total else math.nan


class SkillWatch:
    """Follows the skill over the steps.

    Attributes:
        learned: whether the skill was clearly above the tolerance for half of ``auc_patience`` in a row, once.
        best: highest skill since then.
        without: steps in a row with the skill back at nothing, after it was learned; before, steps without any.
    """

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self.learned = False
        self.best = 0.0
        self.without = Streak()
        self._clear = Streak()

    def see(self, step: int, now: float) -> None:
        """Takes a step's skill; nan says nothing and changes nothing."""
        if math.isnan(now):
            return
        tolerance = self._settings.auc_tolerance
        if self._clear.count(step, now > 1.5 * tolerance) >= self._settings.auc_patience // 2:
            self.learned = True
            self.best = max(self.best, now)
        self.without.count(step, now < max(tolerance, 0.2 * self.best))

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "learned": self.learned,
            "best": self.best,
            "without": asdict(self.without),
            "clear": asdict(self._clear),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from ``state()``."""
        self.learned, self.best = state["learned"], state["best"]
        self.without, self._clear = Streak(**state["without"]), Streak(**state["clear"])
