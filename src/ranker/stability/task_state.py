"""What the classifier keeps per task: the baseline of the loss, and how the last losses compare with it."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Any

import torch
from torch import Tensor

from ranker.stability.detector_settings import MAX_PROOF_STEPS, DetectorSettings
from ranker.stability.skill import SkillWindow

_MIN_VALUES = 16  # number of losses from which their median is a usable level
_LN2 = math.log(2.0)


class Baseline:
    """Running level and noise of the loss of one task, robust to spikes, blow-ups and nan.

        level = median of the last ``window`` accepted losses, rising by at most 2^(1 / max_rise) per step
        scale = max((q75 - q50) / 0.674, (q95 - q50) / 1.645), changing by at most 2^(8 / max_rise) per step
        threshold = max((jump_ratio - 1) level, jump_scales scale, jump_floor untrained)

    A median over a ring buffer has three advantages over a robust moving average: half of the accepted values must be
    wrong before it moves, it has no start-up bias, and any disturbance has left it after ``window`` steps. The scale
    uses two quantiles of the upper half only, because losses are skewed: with few positives per batch, most steps are
    at one level and some are far above it. The scale changes slowly, because a growing loss fills the buffer with
    growing values, which look like noise.

    A loss more than half the threshold above the level is rejected. Two cases need care. After a fast fall of the loss,
    early in training, the buffer would still hold old values: after 16 consecutive losses below the median only these
    are kept. After a small lasting rise, all losses would be rejected for ever: after ``window / 2`` consecutive
    rejections losses are accepted again, and the limit on rising still detects slow blow-ups.

    Attributes:
        untrained: loss of the untrained model: the first finite loss, and at least ``least_untrained``.
        least_untrained: log 2 for a binary task. Where the head starts at the log odds of a rare task, the first loss
            is tiny, and one more positive in a batch multiplies it by 20.
        level: level of the loss; nan before the first loss.
        scale: robust standard deviation of the upper half of the buffer.
    """

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._max_rise_per_step = 2.0 ** (1.0 / settings.max_rise)
        self.untrained = math.nan
        self.least_untrained = 0.0
        self.level = math.nan
        self.scale = 0.0
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._sorted: list[float] = []
        self._below_count = 0  # consecutive losses below the median
        self._rejected_count = 0  # consecutive losses rejected

    def excess(self, loss: float) -> float:
        """Distance of a loss above the level, in thresholds: above 1 it is high, above 0.5 it is rejected."""
        return self._excess(loss, self._settings.jump_scales)

    def median_excess(self, median: float) -> float:
        """The same for the median of the last ``settle`` losses, which is a third as noisy.

        It detects the slowest blow-ups: the growing losses that fill the buffer look like noise, but do not recover.
        """
        return self._excess(median, self._settings.jump_scales / 3.0)

    def _excess(self, loss: float, scales: float) -> float:
        if math.isnan(self.level):
            return 0.0
        s = self._settings
        # The first losses say little about the level, and nothing about the noise.
        floor = s.jump_floor if len(self._losses) >= _MIN_VALUES else 1.0
        threshold = max((s.jump_ratio - 1.0) * self.level, scales * self.scale, floor * self.untrained)
        return (loss - self.level) / max(threshold, 1e-12)

    def accept(self, loss: float) -> None:
        """Adds a finite loss of a step at which no spike is open, unless it must be rejected."""
        if math.isnan(self.untrained):
            self.untrained, self.level = max(loss, self.least_untrained), loss
        self._rejected_count = self._rejected_count + 1 if self.excess(loss) > 0.5 else 0
        if 0 < self._rejected_count <= self._settings.window // 2:
            return
        self._below_count = self._below_count + 1 if self._sorted and loss < self._quantile(0.5) else 0
        self._append(loss)
        if self._below_count >= _MIN_VALUES:
            self.restart(list(self._losses)[-_MIN_VALUES:])
        median = self._quantile(0.5)
        # With few values the median is not reliable: the level may fall, but not rise. The first reliable median
        # replaces a first loss that was low by chance.
        first_median = len(self._losses) == _MIN_VALUES and not self.scale
        if not (first_median and median - self.level <= self._settings.jump_floor * self.untrained):
            rise = self._max_rise_per_step if len(self._losses) >= _MIN_VALUES else 1.0
            median = min(median, self.level * rise)
        self.level = median
        self.scale = self._limited_scale()

    def restart(self, losses: list[float]) -> None:
        """Replaces the buffer by the losses of a new level."""
        self._losses.clear()
        self._losses.extend(losses)
        self._sorted = sorted(self._losses)
        self._below_count = self._rejected_count = 0
        if self._sorted:
            self.level = self._quantile(0.5)

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, and the losses as float64 [n]."""
        return {
            "untrained": self.untrained,
            "least_untrained": self.least_untrained,
            "level": self.level,
            "scale": self.scale,
            "losses": torch.tensor(list(self._losses), dtype=torch.float64),
            "below_count": self._below_count,
            "rejected_count": self._rejected_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()``, or from that of an older version, with a list."""
        losses = state["losses"]
        self._losses = deque(losses.tolist() if isinstance(losses, Tensor) else losses, maxlen=self._settings.window)
        self._sorted = sorted(self._losses)
        self.untrained, self.least_untrained = state["untrained"], state["least_untrained"]
        self.level, self.scale = state["level"], state["scale"]
        self._below_count, self._rejected_count = state["below_count"], state["rejected_count"]

    def _limited_scale(self) -> float:
        if len(self._losses) < _MIN_VALUES:
            return self.scale
        q50, q75, q95 = (self._quantile(q) for q in (0.5, 0.75, 0.95))
        now = max((q75 - q50) / 0.674, (q95 - q50) / 1.645, 1e-3 * q50)
        if not self.scale or len(self._losses) < self._settings.window // 2:
            return now
        change = self._max_rise_per_step**8
        return min(max(now, self.scale / change), self.scale * change)

    def _append(self, loss: float) -> None:
        if len(self._losses) == self._losses.maxlen:
            del self._sorted[bisect_left(self._sorted, self._losses[0])]
        self._losses.append(loss)
        insort(self._sorted, loss)

    def _quantile(self, q: float) -> float:
        return self._sorted[min(int(q * len(self._sorted)), len(self._sorted) - 1)]


class TaskState:
    """State of one task.

    Attributes:
        name: name of the task.
        baseline: level and noise of its loss.
        excess: excess of the last loss over the baseline, in thresholds; infinite where the loss was not finite.
        median_excess: the same for the median of the last losses (``Baseline.median_excess``).
        high_since: first of the consecutive steps whose loss the baseline rejects; None if it does not.
        high_count: number of these losses; steps without labels do not count.
        auc: last training AUC; nan for a regression.
        recent: last finite losses, newest last.
        skill: the last batches.
        ratio: last loss divided by the baseline.
        ratio_to_untrained: last loss divided by the loss of the untrained model.
    """

    def __init__(self, name: str, settings: DetectorSettings) -> None:
        self.name = name
        self.baseline = Baseline(settings)
        self._settings = settings
        self.excess = self.median_excess = 0.0
        self.high_since: int | None = None
        self.high_count = 0
        self.auc = math.nan
        self.recent: deque[float] = deque(maxlen=settings.settle)
        self.skill = SkillWindow(2 * MAX_PROOF_STEPS)
        self.ratio = self.ratio_to_untrained = 1.0
        self._pool = (0.0, 0.0)  # sum of losses, and number of labels, of batches with few labels
        self._loss = 0.0  # what was made of the last loss

    def update(self, step: int, loss: float, auc: float, labels: float = math.nan, positives: float = math.nan) -> None:
        """Takes the signals of a step.

        Args:
            step: number of the step.
            loss: mean over the observed labels; exactly 0 where there was none.
            auc: running training AUC; nan where there is none.
            labels: number of labels; nan where it is unknown.
            positives: number of positive labels; nan for a regression, or where it is unknown.
        """
        if not (math.isnan(auc) and math.isnan(positives)):
            self.baseline.least_untrained = _LN2
        if not math.isnan(auc):
            self.auc = auc
        loss = self._loss = self._pooled(loss, labels)
        if loss == 0.0:
            return
        if math.isfinite(loss):
            self.recent.append(loss)
            self.excess = self.baseline.excess(loss)
            full = len(self.recent) == self.recent.maxlen
            self.median_excess = self.baseline.median_excess(self._median()) if full else 0.0
            self.ratio = loss / self.baseline.level if self.baseline.level > 0 else 1.0
            untrained = self.baseline.untrained
            self.ratio_to_untrained = loss / untrained if untrained > 0 else 1.0
        else:
            self.excess = self.ratio = self.ratio_to_untrained = math.inf
        self.high_count = self.high_count + 1 if self.excess > 0.5 else 0
        if self.excess <= 0.5:
            self.high_since = None
        elif self.high_since is None:
            self.high_since = step

    def update_baseline(self) -> None:
        """Adds the loss of the last step, at which no spike was open, to the baseline."""
        if self._loss != 0.0 and math.isfinite(self._loss):
            self.baseline.accept(self._loss)

    def _pooled(self, loss: float, labels: float) -> float:
        """The mean loss over at least ``min_labels`` labels; 0 until there are so many.

        The loss of one label says nothing about the model, so the few labels of several batches are added up.
        """
        if math.isnan(labels) or not math.isfinite(loss):
            return loss
        if not self._pool[1] and labels >= self._settings.min_labels:
            return loss
        total, count = self._pool[0] + loss * labels, self._pool[1] + labels
        enough = count >= self._settings.min_labels
        self._pool = (0.0, 0.0) if enough else (total, count)
        return total / count if enough else 0.0

    @property
    def median_ratio(self) -> float:
        """Median of the last losses divided by the baseline; 1 without losses."""
        if not self.recent or not self.baseline.level > 0:
            return 1.0
        return self._median() / self.baseline.level

    @property
    def entropy(self) -> float:
        """Approximate label entropy of a binary task, in nats: the level of its loss, which a healthy model is near."""
        return min(self.baseline.level, _LN2) if self.baseline.level > 0 else _LN2

    def _median(self) -> float:
        return sorted(self.recent)[len(self.recent) // 2]

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, lists and tensors."""
        return {
            "baseline": self.baseline.state_dict(),
            "excess": self.excess,
            "median_excess": self.median_excess,
            "high_since": self.high_since,
            "high_count": self.high_count,
            "auc": self.auc,
            "recent": list(self.recent),
            "ratio": self.ratio,
            "ratio_to_untrained": self.ratio_to_untrained,
            "skill": self.skill.state_dict(),
            "pool": list(self._pool),
            "loss": self._loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()``."""
        self.baseline.load_state_dict(state["baseline"])
        self.excess, self.median_excess = state["excess"], state["median_excess"]
        self.high_since, self.high_count, self.auc = state["high_since"], state["high_count"], state["auc"]
        self.recent = deque(state["recent"], maxlen=self._settings.settle)
        self.ratio, self.ratio_to_untrained = state["ratio"], state["ratio_to_untrained"]
        self.skill.load_state_dict(state["skill"])
        self._pool, self._loss = (state["pool"][0], state["pool"][1]), state["loss"]
