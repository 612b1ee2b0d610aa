"""Runs a detector over a generated trace, as training does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ranker.stability import DivergenceDetector, Event
from signal_traces import TASKS, Trace

Outcome = tuple[DivergenceDetector, list[Event]]


@pytest.fixture
def judged() -> Callable[..., Outcome]:
    """Runs a detector over a trace as training does: polls, stops after a full divergence, passes the hold-out."""

    def call(trace: Trace, *, poll_every: int = 10, held_out: bool = True, **settings: float) -> Outcome:
        detector = DivergenceDetector(TASKS, **settings)
        events: list[Event] = []
        for i in range(len(trace)):
            detector.update(i + 1, **trace.signals(i))
            if (i + 1) % poll_every == 0:
                events += detector.poll()
                if detector.status == "diverged":
                    break
        return detector, events + detector.finish(trace.eval_auc_T if held_out else None)

    return call
