"""Early stopping on progressive validation: ends a run that predicts the next windows ever worse, and goes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ranker.capsules.training_state import TrainingState
from ranker.errors import UserError
from ranker.stability import DivergenceDetector
from ranker.stability.worth import relative_loss
from ranker.training.fit import Fit
from ranker.training.progress import Say
from ranker.training.snapshots import SnapshotRing, restore


class EarlyStop:
    """Stops when windows that were not trained on yet are predicted clearly worse than before, several times in a row.

        loss of a window = mean over tasks of loss / loss of the best constant prediction on that window
        bad: loss > (1 + tolerance) * median of the good windows so far

    The relative loss is the normalised entropy of a binary task and MSE / variance of a regression, so that a window
    with a higher base rate is not taken for a worse model. After ``patience`` bad windows in a row the run goes back to
    the newest snapshot from before the first of them (``callbacks.snapshots``), and ends there as completed. Where no
    such snapshot is kept, it ends with the weights as they are. All ranks see the same numbers.

    Args:
        patience: bad windows in a row; 0 switches it off.
        tolerance: share by which a loss may be above the median.
        min_windows: good windows from which on a window is judged.

    Attributes:
        reason: why the run was stopped; empty if it was not.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(self, *, patience: int = 0, tolerance: float = 0.1, min_windows: int = 3) -> None:
        if patience < 0 or not tolerance > 0 or min_windows < 1:
            raise UserError(
                "callbacks.early_stop: patience >= 0, tolerance > 0 and min_windows >= 1 are needed, got "
                f"patience={patience}, tolerance={tolerance}, min_windows={min_windows}"
            )
        self._patience, self._tolerance, self._min_windows = patience, tolerance, min_windows
        self._good: list[tuple[int, float]] = []  # step before which a window was scored, and its loss
        self._scored: tuple[int, Mapping[str, float]] | None = None  # the last window that was looked at
        self._bad: list[tuple[int, float]] = []  # likewise
        self.reason = ""

    def after_step(self, fit: Fit, *, ring: SnapshotRing | None, detector: DivergenceDetector | None, say: Say) -> bool:
        """Looks at the window that was scored last. True when the run has to stop; it has gone back by then."""
        scored = fit.module.last_progressive
        if not self._patience or scored is None or scored is self._scored:
            return False
        self._scored = scored
        losses = [relative_loss(scored[1], task.name) for task in fit.module.schema.tasks]
        known = [loss for loss in losses if not math.isnan(loss)]
        if not known:
            return False
        loss = sum(known) / len(known)
        if len(self._good) < self._min_windows or loss <= (1 + self._tolerance) * self._level():
            self._good.append((fit.step - 1, loss))
            self._bad = []
            return False
        self._bad.append((fit.step - 1, loss))
        if len(self._bad) < self._patience:
            return False
        self._stop(fit, ring, detector, say)
        return True

    def forget_after(self, step: int) -> None:
        """Forgets the windows that were scored after a step: a rollback has undone them, and they come again."""
        self._good, self._bad = ([(at, x) for at, x in losses if at < step] for losses in (self._good, self._bad))

    def state_dict(self) -> dict[str, Any]:
        """The losses so far, for a checkpoint."""
        return {"good": list(self._good), "bad": list(self._bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        good = [x if isinstance(x, (list, tuple)) else (-1, x) for x in state["good"]]  # older ones have no step
        self._good = [(int(step), float(loss)) for step, loss in good]
        self._bad = [(int(step), float(loss)) for step, loss in state["bad"]]

    def _level(self) -> float:
        return sorted(loss for _, loss in self._good)[len(self._good) // 2]

    def _stop(self, fit: Fit, ring: SnapshotRing | None, detector: DivergenceDetector | None, say: Say) -> None:
        first = self._bad[0][0]
        snapshot = next((s for s in reversed(ring.snapshots if ring else []) if s.step <= first), None)
        worse = ", ".join(f"{loss:.3g}" for _, loss in self._bad)
        self.reason = (
            f"stopped early at step {fit.step}: the relative loss of the last {len(self._bad)} windows was {worse}, "
            f"before {self._level():.3g}; {self._gone_back(snapshot)}"
        )
        say(self.reason, note="stopped early")
        if snapshot is not None and ring is not None:
            restore(snapshot, fit, detector)
            ring.forget_after(snapshot.step, now=fit.step)

    def _gone_back(self, snapshot: TrainingState | None) -> str:
        if snapshot is None:
            return "no snapshot from before that is kept, so the weights are those of the stop"
        return f"went back to step {snapshot.step}"
