"""The spikes of a run that are not settled: the open one, those on probation, and a blow-up not yet made up for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.loss_spike import LossSpike, Probation
from ranker.stability.skill import Skill
from ranker.stability.task_state import TaskState


class OpenSpikes:
    """Keeps the spikes until their verdict, and what is needed for it.

    Attributes:
        spike: the open spike, if any.
        probation: the spikes that are over but not settled, if any.
        blowup: first blow-up; the start of the divergence if nothing is learned after it.
        deepest: deepest spike since the blow-up, if one is deeper; it belongs to the same divergence.
        last: the last spike that has ended.
        before: skill per task before the open spike.
        cut: largest step cut since the first open or unsettled spike began.
    """

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self.spike: LossSpike | None = None
        self.probation: Probation | None = None
        self.blowup: LossSpike | None = None
        self.deepest: LossSpike | None = None
        self.last: LossSpike | None = None
        self.before: list[Skill] = []
        self.cut = math.nan

    @property
    def first(self) -> LossSpike | None:
        """The first of the spikes that are open or on probation."""
        return self.probation.spikes[0] if self.probation else self.spike

    @property
    def every(self) -> list[LossSpike]:
        """The spikes on probation and the open one, in order."""
        return [*(self.probation.spikes if self.probation else []), *([self.spike] if self.spike else [])]

    @property
    def skill_before(self) -> list[Skill]:
        """Skill per task before the first of them; empty where none is open."""
        return self.probation.before if self.probation else self.before if self.spike else []

    @property
    def skill_was_known(self) -> bool:
        """Whether that skill is known of a task."""
        return any(skill.is_known for skill in self.skill_before)

    def is_harmless(self, spike: LossSpike) -> bool:
        """Whether a spike is one of the first steps that did not blow up."""
        return spike.startup and spike.ratio_to_untrained < self._settings.blowup_ratio

    def begin(self, spike: LossSpike, tasks: Sequence[TaskState]) -> None:
        """Opens a spike."""
        self.spike = spike
        last = spike.step - 1
        first = last - 2 * self._settings.proof_steps + 1
        self.before = [task.skill.between(first, last) for task in tasks]

    def update(self, step: int, tasks: Sequence[TaskState], *, nonfinite: bool, constant: bool) -> None:
        """Updates the open spike with a step; see ``LossSpike.update``."""
        assert self.spike is not None
        if self.blowup is None and self.spike.ratio_to_untrained >= self._settings.blowup_ratio:
            self.blowup = self.spike
        self.spike.update(step, tasks, nonfinite=nonfinite, constant=constant)
        if self.blowup is not None and self.spike.depth > (self.deepest or self.blowup).depth:
            self.deepest = self.spike

    def update_cut(self, cut: float) -> None:
        """Keeps the largest step cut while a spike is open or on probation."""
        if self.spike is None and self.probation is None:
            self.cut = math.nan
        elif not math.isnan(cut):
            self.cut = cut if math.isnan(self.cut) else max(self.cut, cut)

    def since_blowup(self) -> list[LossSpike]:
        """The blow-up, and the deepest spike since then where it is another one; empty without a blow-up."""
        if self.blowup is None:
            return []
        later = self.deepest is not None and self.deepest.step != self.blowup.step
        return [self.blowup, self.deepest] if later and self.deepest else [self.blowup]

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings, lists and dicts."""
        spikes = {"open": self.spike, "blowup": self.blowup, "last": self.last, "deepest": self.deepest}
        return {
            "spikes": {name: asdict(spike) if spike else None for name, spike in spikes.items()},
            "before": [asdict(skill) for skill in self.before],
            "probation": self.probation.state_dict() if self.probation else None,
            "cut": self.cut,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()``."""
        spikes = {name: LossSpike(**spike) if spike else None for name, spike in state["spikes"].items()}
        self.spike, self.last = spikes["open"], spikes["last"]
        # The same object while the spike is open.
        self.blowup, self.deepest = (self._or_open(spikes.get(name)) for name in ("blowup", "deepest"))
        self.before = [Skill(**skill) for skill in state["before"]]
        self.probation = Probation.of(state["probation"]) if state["probation"] else None
        self.cut = state["cut"]

    def _or_open(self, spike: LossSpike | None) -> LossSpike | None:
        same = spike is not None and self.spike is not None and spike.step == self.spike.step
        return self.spike if same else spike
