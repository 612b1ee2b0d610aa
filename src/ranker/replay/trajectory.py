"""What a replay gives: the signals of each batch, and what the detector makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ranker.stability import Event


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A stretch of training.

    Attributes:
        name: what to call it.
        steps: of each batch, the step it belongs to.
        signals_SN: float32 [S, 3 T + 1], in the order of ``ranker.stability.pack``.
        event: the first divergence that the detector saw in it: one it settled, or else one still open at its end.
    """

    name: str
    steps: Sequence[int]
    signals_SN: Tensor
    event: Event | None

    @property
    def tasks(self) -> int:
        """T."""
        return self.signals_SN.shape[1] // 3

    @property
    def losses_ST(self) -> Tensor:  # noqa: N802
        """Unweighted loss of each task."""
        return self.signals_SN[:, : self.tasks]

    @property
    def auc_ST(self) -> Tensor:  # noqa: N802
        """Training AUC of each task; nan for regressions."""
        return self.signals_SN[:, self.tasks : 2 * self.tasks]

    def __str__(self) -> str:
        """What became of it, in a few words."""
        event = self.event
        if event is None:
            return "healthy"
        depth = f"{event.depth:.3g}x" if math.isfinite(event.depth) else "not finite"
        back = (
            f"came back at step {event.recovered_at}" if event.recovered_at is not None else "was not back at the end"
        )
        return f"moved at step {event.step}" + (f" ({depth}), {back}" if event.depth != 1.0 else f", {back}")


def first_difference(recorded_ST: Tensor, replayed_ST: Tensor) -> int | None:
    """Place of the first batch whose losses are not the same to the last bit; None where all are. nan equals nan."""
    both = recorded_ST.isnan() & replayed_ST.isnan()
    same_ST = (recorded_ST.view(torch.int32) == replayed_ST.view(torch.int32)) | both
    wrong = (~same_ST.all(dim=1)).nonzero()
    return int(wrong[0]) if len(wrong) else None


def largest_difference(recorded_ST: Tensor, replayed_ST: Tensor) -> float:
    """Largest |a - b| / max(|a|, |b|) over the losses that are finite in both; infinite where only one of them is."""
    finite = recorded_ST.isfinite(), replayed_ST.isfinite()
    if not torch.equal(*finite):
        return math.inf
    a, b = recorded_ST[finite[0]].double(), replayed_ST[finite[0]].double()
    if not len(a):
        return 0.0
    return float(((a - b).abs() / torch.maximum(a.abs(), b.abs()).clamp(min=1e-30)).max())
