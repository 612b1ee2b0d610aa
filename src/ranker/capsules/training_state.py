"""Where a run stands, as far as its next steps depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a step reads and changes, as plain tensors and numbers.

    Attributes:
        step: optimizer steps taken.
        net: the weights.
        optimizer: its state.
        schedule: that of the learning rate; None where there is none.
        auc: histograms of the training AUC: of one rank while it trains, of all of them together in a replay.
        detector: the divergence detector's state; None starts it anew.
        rng: of torch on the CPU; None leaves it alone.
    """

    step: int
    net: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any] | None
    auc: Tensor
    detector: dict[str, Any] | None
    rng: Tensor | None = None
