"""A divergence watch whose verdicts and suspicions a test chooses, in a real fit."""

from __future__ import annotations

from typing import Any

from ranker.stability import DivergenceDetector, Event
from ranker.stability.detector_interface import Kind
from ranker.training.fit import Fit
from ranker.training.stability_callback import DivergenceWatch


def event(first: int, judged_at: int, kind: Kind = "full") -> Event:
    return Event(
        kind=kind,
        step=first,
        task="",
        depth=1.0,
        length=judged_at - first,
        recovered_at=None,
        judged_at=judged_at,
        reason="said so",
    )


class Verdicts(DivergenceWatch):
    """Reports events at chosen steps, and nothing of its own.

    Args:
        full: first step of a full divergence by step of the verdict.
        micro: the same of micro divergences.
        suspected: first step of what is suspected, by step at which the detector is asked.
    """

    def __init__(
        self,
        full: dict[int, int] | None = None,
        *,
        micro: dict[int, int] | None = None,
        suspected: dict[int, int] | None = None,
    ) -> None:
        super().__init__(poll_every=1, settings={"jump_ratio": 1e6, "lost_ratio": 1e6})
        self._full, self._micro, self._suspected = full or {}, micro or {}, suspected or {}

    def start(self, fit: Fit, state: Any) -> DivergenceDetector:
        watch = self
        detector = super().start(fit, state)

        class Scripted(type(detector)):  # type: ignore[misc]
            def poll(self, *, wait: bool = False) -> list[Event]:
                named = {"full": watch._full, "micro": watch._micro}
                return [event(at[fit.step], fit.step, kind) for kind, at in named.items() if fit.step in at]  # type: ignore[arg-type]

            @property
            def suspicion(self) -> Event | None:
                first = watch._suspected.get(fit.step)
                return None if first is None else event(first, fit.step)

            @property
            def status(self) -> str:
                return "healthy" if self.suspicion is None else "suspect"

        detector.__class__ = Scripted
        return detector
