"""What a task's predictions are worth over a range of batches, and whether they are worth less than before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ranker.stability.detector_settings import DetectorSettings

_NAN = math.nan
CERTAIN = 3.0  # standard errors beyond which a difference is not chance
_AUC_NOISE = 0.29  # standard deviation of an AUC without skill, times the root of its pairs: 1 / sqrt(12)


@dataclass(frozen=True)
class Skill:
    """What the predictions of one task were worth, over a range of batches.

    Attributes:
        auc: mean of the batches' AUCs, weighted by ``pairs``; nan for regressions and without both labels. Each batch
            is compared with itself alone, because the scores of two different models have no common scale.
        pairs: sum over the batches of p n / (p + n), p and n the numbers of positive and negative labels. The standard
            error of the AUC is at most about 0.29 / sqrt(pairs).
        relative_loss: loss divided by that of the best constant prediction; 1 is worth nothing. For a binary task this
            is the normalised entropy, over all batches together. For a regression it is the median over the batches of
            MSE / variance of the labels, because a few outliers can decide a mean. nan where it is unknown.
        noise: standard error of the relative loss.
    """

    auc: float = _NAN
    pairs: float = 0.0
    relative_loss: float = _NAN
    noise: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether anything is known."""
        return not (math.isnan(self.auc) and math.isnan(self.relative_loss))

    def lost_auc(self, before: Skill, settings: DetectorSettings, *, errors: float = CERTAIN) -> bool:
        """Whether the AUC is clearly below what is left to keep of an earlier one.

        before - now > max(auc_tolerance, lost_share (before - 0.5)) + errors * 0.29 sqrt(1 / pairs + 1 / pairs_before)

        A task with few positives has a wide tolerance, and one that had not learned anything cannot lose it.

        Args:
            before: the earlier skill.
            settings: ``auc_tolerance`` and ``lost_share``.
            errors: number of standard errors that count as chance; more where there are many chances.
        """
        if math.isnan(self.auc) or math.isnan(before.auc):
            return False
        tolerance = max(settings.auc_tolerance, settings.lost_share * (before.auc - 0.5))
        return before.auc - self.auc > tolerance + errors * self._auc_error(before)

    def lost_half_of_auc(self, before: Skill, settings: DetectorSettings) -> bool:
        """Whether clearly less than half of the AUC's distance from 0.5 is left."""
        if math.isnan(self.auc) or math.isnan(before.auc):
            return False
        tolerance = max(settings.auc_tolerance, 0.5 * (before.auc - 0.5))
        return before.auc - self.auc > tolerance + CERTAIN * self._auc_error(before)

    def lost_fit(self, before: Skill) -> bool:
        """Whether the loss is clearly nearer to that of a constant prediction than before.

        now > before + max(0.1, (1 - before) / 2) + 3 standard errors
        """
        if math.isnan(self.relative_loss) or math.isnan(before.relative_loss):
            return False
        tolerance = max(0.1, 0.5 * (1.0 - before.relative_loss)) + CERTAIN * math.hypot(self.noise, before.noise)
        return self.relative_loss > before.relative_loss + tolerance

    def _auc_error(self, before: Skill) -> float:
        if not self.pairs or not before.pairs:
            return math.inf
        return _AUC_NOISE * math.sqrt(1.0 / self.pairs + 1.0 / before.pairs)


class SkillWindow:
    """The last batches of one task.

    Args:
        size: number of batches.
    """

    def __init__(self, size: int) -> None:
        self._batches: deque[tuple[int, float, float, float, float, float]] = deque(maxlen=size)

    def add(self, step: int, *, loss: float, auc: float, positives: float, labels: float, variance: float) -> None:
        """Adds a batch. One without labels, or whose number of labels is unknown, counts for nothing."""
        if labels > 0:
            self._batches.append((step, loss, auc, positives, labels, variance))

    def between(self, first: int, last: int) -> Skill:
        """The skill over the batches of steps first .. last."""
        batches = [batch for batch in self._batches if first <= batch[0] <= last]
        weighted = pairs = 0.0
        for _, _, auc, positives, labels, _ in batches:
            weight = positives * (labels - positives) / labels
            if not math.isnan(auc):
                weighted, pairs = weighted + weight * auc, pairs + weight
        relative, noise = _relative_loss([b for b in batches if math.isfinite(b[1])])
        return Skill(weighted / pairs if pairs else _NAN, pairs, relative, noise)

    def state_dict(self) -> Tensor:
        """The batches, float64 [N, 6]: as lists they would be most of the objects that a checkpoint has to pickle."""
        return torch.tensor(list(self._batches), dtype=torch.float64).view(-1, 6)

    def load_state_dict(self, state: Tensor | Iterable[Any]) -> None:
        """Continues from ``state_dict()``, or from the lists of an older version."""
        rows = state.tolist() if isinstance(state, Tensor) else state
        self._batches.clear()
        self._batches.extend((int(step), *map(float, rest)) for step, *rest in rows)  # type: ignore[misc]


def _relative_loss(batches: list[tuple[int, float, float, float, float, float]]) -> tuple[float, float]:
    """``Skill.relative_loss`` and its standard error."""
    labels, positives = sum(b[4] for b in batches), sum(b[3] for b in batches)
    if 0 < positives < labels:  # a binary task; no positive is counted for a regression
        share = positives / labels
        entropy = -share * math.log(share) - (1 - share) * math.log1p(-share)
        found = sum(b[1] * b[4] for b in batches) / labels / entropy
        return found, found / math.sqrt(positives)
    ratios = sorted(loss / variance for _, loss, _, _, _, variance in batches if variance > 0)
    if positives or len(ratios) < 8:
        return _NAN, 0.0
    spread = (ratios[(3 * len(ratios)) // 4] - ratios[len(ratios) // 4]) / 1.35
    return statistics.median(ratios), 1.25 * spread / math.sqrt(len(ratios))
