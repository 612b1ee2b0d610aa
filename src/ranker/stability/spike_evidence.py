"""What the losses and the skill of the tasks say about a spike: whether one begins, and what a model has lost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.loss_spike import RECOVERED, LossSpike
from ranker.stability.skill import Skill
from ranker.stability.task_state import TaskState


def detect_spike(
    step: int, tasks: Sequence[TaskState], settings: DetectorSettings, *, nonfinite: bool, startup: bool
) -> LossSpike | None:
    """A new spike, if a loss is above its threshold or a value is not finite.

    At least half of the tasks must have moved (two, where there are two), or the spike must last. A few outlier
    rows in heavy-tailed data raise the loss of a regression or two for one step, by more than many divergences do,
    whereas a move of the shared layers affects most tasks. The spike begins where the first of the tasks rose above
    its baseline and stayed there, so waiting does not change its first step. In the first steps, where a spike by
    itself is not an event, any high loss opens one: what counts is whether the model learns after it.

    Args:
        step: number of the step.
        tasks: state of the tasks after this step.
        settings: thresholds.
        nonfinite: a loss or prediction is not finite.
        startup: whether this is one of the first steps.
    """
    high, rising = [t for t in tasks if t.excess > 1.0], [t for t in tasks if t.median_excess > 1.0]
    if not (nonfinite or high or rising):
        return None
    moved = [(t.high_since, -t.excess, t.name) for t in tasks if t.high_since is not None]
    first, _, name = min(moved + [(step, -t.median_excess, t.name) for t in rising], default=(step, 0.0, ""))
    lasts = rising or any(t.high_count >= settings.outlier_steps for t in high)
    alone = len(tasks) == 1
    broad = tasks[0].excess >= settings.lone_factor if alone else 2 * len(moved) >= max(len(tasks), 4)
    if not (nonfinite or startup or lasts or (high and broad)):
        return None
    return LossSpike(step=first, task=name, depth=1.0, startup=startup)


def what_was_lost(step: int, tasks: Sequence[TaskState], before: Sequence[Skill], settings: DetectorSettings) -> str:
    """Which task's skill over the last batches is not what it was before, in words; empty where all are."""
    first = step - settings.proof_steps + 1
    for task, was in zip(tasks, before, strict=True):
        now = task.skill.between(first, step)
        if now.lost_auc(was, settings):
            return f"the AUC of {task.name} did not: {was.auc:.3f} before, {now.auc:.3f}"
        if now.lost_fit(was):
            worth = f"{was.relative_loss:.3f} before, {now.relative_loss:.3f}"
            return f"the loss of {task.name} beside that of a constant prediction did not: {worth}"
    return ""


def losses_are_lost(tasks: Sequence[TaskState], settings: DetectorSettings) -> bool:
    """Whether losses that stay high mean a lost model: most of them are high, or one is very high."""
    ratios = [t.median_ratio for t in tasks if max(t.excess, t.median_excess) > RECOVERED]
    if any(r >= settings.lost_ratio_alone for r in ratios):
        return True
    return 2 * sum(r >= settings.lost_ratio for r in ratios) > len(tasks)


def worse_than_constant(step: int, tasks: Sequence[TaskState], settings: DetectorSettings) -> str:
    """A task whose loss is high, and no better than that of a constant prediction, in words; or nothing."""
    first = step - settings.proof_steps + 1
    for task in tasks:
        now = task.skill.between(first, step)
        if max(task.excess, task.median_excess) > 0.5 and now.relative_loss - 3.0 * now.noise >= 1.0:
            return f"the loss of {task.name} is {now.relative_loss:.3g}x that of a constant prediction"
    return ""


def entropy_of_useless_model(aucs: Sequence[float], nes: Sequence[float], settings: DetectorSettings) -> float:
    """The median normalised entropy on the hold-out, if it and the AUCs show that the model is lost; otherwise 0.

    Medians, so that neither the noisy AUC of a rare task nor one badly calibrated task decides.
    """
    aucs, nes = ([x for x in values if not math.isnan(x)] for values in (aucs, nes))
    if not aucs or not nes or statistics.median(aucs) >= 0.5 + 2.0 * settings.auc_tolerance:
        return 0.0
    entropy = statistics.median(nes)
    return entropy if entropy >= settings.lost_ne else 0.0
