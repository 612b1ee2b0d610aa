"""A jump of the losses, from its first step until it is settled what it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.task_state import TaskTrack

_CALM = 0.75  # thresholds above the baseline; a little below 1, so that a loss at the threshold does not flicker


@dataclass
class Jump:
    """A jump that is not over.

    Attributes:
        step: first step.
        task: name of the task that moved first; empty where only predictions were not finite.
        worst: name of the task whose loss rose highest.
        depth: highest loss over its baseline so far; infinite where a loss or prediction was not finite.
        startup: opened among the first steps, where a jump that ends is no event.
        over_first: highest loss so far over the task's first loss.
        calm: steps in a row below the threshold.
        calm_since: first of them.
    """

    step: int
    task: str
    depth: float
    startup: bool
    worst: str = ""
    over_first: float = 1.0
    calm: int = 0
    calm_since: int = 0

    def follow(self, step: int, tasks: Sequence[TaskTrack], *, broken: bool, flat: bool) -> None:
        """Takes a step: how deep it is, and whether it may be over.

        Args:
            step: number of the step.
            tasks: the tasks, after they have seen the step.
            broken: a loss or prediction is not finite.
            flat: predictions do not depend on the input; a loss that came back with them has not recovered.
        """
        for task in tasks:
            self.over_first = max(self.over_first, task.over_first)
            if task.excess > 1.0 and task.now > self.depth:
                self.depth, self.worst = task.now, task.name
        if broken:
            self.depth = self.over_first = math.inf
        if broken or flat or any(t.excess > _CALM for t in tasks):
            self.calm = 0
            return
        self.calm_since = self.calm_since if self.calm else step
        self.calm += 1

    def over(self, tasks: Sequence[TaskTrack], settings: DetectorSettings) -> bool:
        """Whether it has ended: calm for ``settle`` steps, and no loss on a slow way up."""
        return self.calm >= settings.settle and all(t.lasting <= _CALM for t in tasks)

    def __str__(self) -> str:
        worst = self.worst or self.task
        who = f"the loss of {worst}" if worst else "a prediction"
        how = f"jumped to {self.depth:.3g}x its past" if math.isfinite(self.depth) else "became infinite or nan"
        first = f" (task {self.task} moved first)" if self.task not in ("", worst) else ""
        return f"{who} {how} at step {self.step}{first}"


def open_jump(
    step: int, tasks: Sequence[TaskTrack], settings: DetectorSettings, *, broken: bool, startup: bool
) -> Jump | None:
    """A jump, if this step opens one: a loss above its threshold, or anything not finite.

    Half of the tasks at least must have moved (two, where there are two), or the jump must last. A few rows far out in
    heavy-tailed data lift the loss of a regression or two for one step, more than many a divergence does; shared
    layers that move take most tasks with them. The jump begins where the first of the tasks left its baseline without
    coming back since, so its first step is not lost by waiting. At the start, where a jump alone is no event, any will
    do: what matters is whether the model learns after it.
    """
    high, slow = [t for t in tasks if t.excess > 1.0], [t for t in tasks if t.lasting > 1.0]
    if not (broken or high or slow):
        return None
    moved = [(t.moved_since, -t.excess, t.name) for t in tasks if t.moved_since is not None]
    first, _, name = min(moved + [(step, -t.lasting, t.name) for t in slow], default=(step, 0.0, ""))
    lasts = slow or any(t.moved_since is not None and step - t.moved_since + 1 >= settings.outlier_steps for t in high)
    broad = tasks[0].excess >= settings.lone_factor if len(tasks) == 1 else 2 * len(moved) >= max(len(tasks), 4)
    if not (broken or startup or lasts or (high and broad)):
        return None
    return Jump(step=first, task=name, depth=1.0, startup=startup)


def far_above(tasks: Sequence[TaskTrack], settings: DetectorSettings) -> bool:
    """Whether losses that stay high are those of a lost model: most of them, or one of them by far."""
    ratios = [t.ratio for t in tasks if max(t.excess, t.lasting) > _CALM]
    if any(r >= settings.lost_ratio_alone for r in ratios):
        return True
    return 2 * sum(r >= settings.lost_ratio for r in ratios) > len(tasks)
