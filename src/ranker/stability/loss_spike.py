"""A spike of the losses while it is open, and the probation after it, until it is known whether the model came back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.skill import Skill
from ranker.stability.task_state import TaskState

RECOVERED = 0.75  # in thresholds above the baseline; below 1, so that a loss at the threshold does not flicker


@dataclass
class LossSpike:
    """A spike of the losses, from its first step until the verdict.

    Attributes:
        step: first step.
        task: name of the task whose loss moved first; empty where only predictions were not finite.
        depth: highest ratio of a loss to its baseline so far; infinite where a loss or prediction was not finite.
        startup: whether it began in the first steps, where a spike that recovers is not an event.
        worst: name of the task with the highest ratio.
        ratio_to_untrained: highest ratio of a loss to that of the untrained model so far.
        calm_steps: number of consecutive steps below the threshold.
        calm_since: first of these steps.
    """

    step: int
    task: str
    depth: float
    startup: bool
    worst: str = ""
    ratio_to_untrained: float = 1.0
    calm_steps: int = 0
    calm_since: int = 0

    def update(self, step: int, tasks: Sequence[TaskState], *, nonfinite: bool, constant: bool) -> None:
        """Updates depth and recovery with a step.

        Args:
            step: number of the step.
            tasks: state of the tasks after this step.
            nonfinite: a loss or prediction is not finite.
            constant: predictions do not depend on the input; a loss that is low because of that has not recovered.
        """
        for task in tasks:
            self.ratio_to_untrained = max(self.ratio_to_untrained, task.ratio_to_untrained)
            if task.excess > 1.0 and task.ratio > self.depth:
                self.depth, self.worst = task.ratio, task.name
        if nonfinite:
            self.depth = self.ratio_to_untrained = math.inf
        if nonfinite or constant or any(t.excess > RECOVERED for t in tasks):
            self.calm_steps = 0
            return
        self.calm_since = self.calm_since if self.calm_steps else step
        self.calm_steps += 1

    def has_recovered(self, tasks: Sequence[TaskState], settings: DetectorSettings) -> bool:
        """Whether all losses have been low for ``settle`` steps, and none is rising slowly."""
        return self.calm_steps >= settings.settle and all(t.median_excess <= RECOVERED for t in tasks)

    def is_event(self, settings: DetectorSettings) -> bool:
        """Whether there was a spike at all: it lasted a step, and a loss was as far above its past as a jump is.

        The median of the last losses may open a spike at a step whose own loss is low already.
        """
        return self.calm_since > self.step and self.depth >= settings.jump_ratio

    def __str__(self) -> str:
        worst = self.worst or self.task
        who = f"the loss of {worst}" if worst else "a prediction"
        how = f"jumped to {self.depth:.3g}x its past" if math.isfinite(self.depth) else "became infinite or nan"
        first = f" (task {self.task} moved first)" if self.task not in ("", worst) else ""
        return f"{who} {how} at step {self.step}{first}"


@dataclass
class Probation:
    """The time from the end of a spike until it is known whether what was learned came back with the loss.

    A spike within it belongs to the same probation.

    Attributes:
        spikes: the spikes, none of which is open any more.
        before: skill per task before the first of them.
        since: first step after the last of them.
        deadline: step at which the verdict is due.
    """

    spikes: list[LossSpike]
    before: list[Skill]
    since: int
    deadline: int

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings, lists and dicts."""
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Probation:
        """Continues from ``state_dict()``."""
        made = cls(**state)
        made.spikes = [LossSpike(**spike) for spike in state["spikes"]]
        made.before = [Skill(**skill) for skill in state["before"]]
        return made
