"""The events of a run: how spikes become events, in numbers and in words, and what is counted of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ranker.stability.detector_interface import Event, Kind
from ranker.stability.loss_spike import LossSpike


class EventLedger:
    """Makes the events and counts them.

    Attributes:
        full_divergence: the full divergence, if any.
        micro_count: number of spikes that recovered.
        unsettled_count: number of spikes of which it is not known, because training ended.
        first_step: first step of the earliest divergence.
    """

    def __init__(self) -> None:
        self.full_divergence: Event | None = None
        self.micro_count = self.unsettled_count = 0
        self.first_step: int | None = None

    def micro(self, spike: LossSpike, step: int) -> Event:
        """The event of a spike that is over; judged at a step."""
        self.micro_count += 1
        if not spike.calm_steps:
            return self._divergence("micro", [spike], step, None, not_yet_back(spike))
        text = f"{spike} and came back in {spike.calm_since - spike.step} steps"
        return self._divergence("micro", [spike], step, spike.calm_since, text)

    def unsettled(self, spike: LossSpike, step: int) -> Event:
        """The event of a spike before whose verdict training ended."""
        self.unsettled_count += 1
        text = f"{spike}; training ended before it was known whether the model recovered"
        return self._divergence("unsettled", [spike], step, spike.calm_since if spike.calm_steps else None, text)

    def full(self, spikes: Sequence[LossSpike], step: int, reason: str) -> Event:
        """The full divergence. It began with the first of its spikes, and is as deep as the deepest.

        Args:
            spikes: those that belong to it, the first one first.
            step: step of the verdict.
            reason: what happened, in words; of several spikes, the first and the deepest are added where it lacks them.
        """
        deepest = max(spikes, key=lambda spike: spike.depth)
        if len(spikes) > 1 and str(spikes[0]) not in reason:
            reason = f"{spikes[0]}; {reason}"
        if str(deepest) not in reason and deepest.depth > spikes[0].depth:
            reason = f"{reason}; {deepest}"
        self.full_divergence = self._divergence("full", spikes, step, None, reason)
        return self.full_divergence

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings and dicts."""
        return {
            "full_divergence": asdict(self.full_divergence) if self.full_divergence else None,
            "micro_count": self.micro_count,
            "unsettled_count": self.unsettled_count,
            "first_step": self.first_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()``."""
        self.full_divergence = Event(**state["full_divergence"]) if state["full_divergence"] else None
        self.micro_count, self.unsettled_count = state["micro_count"], state["unsettled_count"]
        self.first_step = state["first_step"]

    def _divergence(
        self, kind: Kind, spikes: Sequence[LossSpike], step: int, recovered_at: int | None, reason: str
    ) -> Event:
        first = spikes[0].step
        self.first_step = first if self.first_step is None else min(self.first_step, first)
        return event(kind, spikes, step, recovered_at, reason)


def event(kind: Kind, spikes: Sequence[LossSpike], step: int, recovered_at: int | None, reason: str) -> Event:
    """An event that begins with the first of its spikes, judged at a step."""
    first = spikes[0]
    return Event(
        kind=kind,
        step=first.step,
        task=first.task,
        depth=max(spike.depth for spike in spikes),
        length=(step if recovered_at is None else recovered_at) - first.step,
        recovered_at=recovered_at,
        judged_at=step,
        reason=reason,
    )


def not_yet_back(spike: LossSpike) -> str:
    """Of a spike at the end of training whose loss was still high."""
    return f"{spike} and had not come back when training ended"


def not_recovered(spike: LossSpike, step: int) -> str:
    """Of a spike that is open at a step."""
    return f"{spike} and has not come back for {step - spike.step} steps"


def came_back(spike: LossSpike) -> str:
    """Of a spike whose loss is back, and of which more is to be said."""
    return (
        not_yet_back(spike)
        if not spike.calm_steps
        else (f"{spike}; the loss came back after {spike.calm_since - spike.step} steps")
    )
