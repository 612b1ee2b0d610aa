"""What a detector reports."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["micro", "full", "shift"]
Status = Literal["healthy", "suspect", "diverged"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to the model.

    Attributes:
        kind: ``micro``, the loss jumped and came back; ``full``, the model is lost; ``shift``, one loss moved to a new
            level and stayed while the model goes on predicting, which is no divergence (labels change too).
        step: first step of it.
        task: name of the task that moved first; empty where all moved at once.
        depth: highest loss of it over the loss before, over all tasks; infinite where a loss was not finite.
        length: steps from the first to the recovery, or to the verdict where there was none.
        recovered_at: step from which the loss was back; None where it never was.
        judged_at: step whose signals settled the matter; ``judged_at - step`` is the latency.
        reason: what happened, in plain words.
    """

    kind: Kind
    step: int
    task: str
    depth: float
    length: int
    recovered_at: int | None
    judged_at: int
    reason: str

    def __str__(self) -> str:
        return self.reason

    def to_dict(self) -> dict[str, Any]:
        """The fields, fit for JSON: a depth that is not finite becomes None."""
        return asdict(self) | {"depth": self.depth if math.isfinite(self.depth) else None}
