"""Signals of training steps that are computed for several steps at once, when somebody reads one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from ranker.stability.detector_interface import with_step_cut
from ranker.stability.step_cut import StepCut
from ranker.training.training_step import Seen, StepSignals, Trainable, several_signals, step_signals

KEPT = 16  # batches, at most, whose signals are not computed yet


class LateSignals:
    """The signals of one batch. Reading them computes those of all batches that wait.

    Args:
        settle: computes them, and calls ``know`` of each.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self._of: tuple[StepSignals, Tensor, int | None] | None = None  # of several steps, their rows, which of them
        self._cut_3: Tensor | None = None

    @property
    def is_known(self) -> bool:
        """Whether reading costs nothing any more."""
        return self._of is not None

    @property
    def losses_T(self) -> Tensor:  # noqa: N802
        """Loss of each task; see ``StepSignals``."""
        signals, _, step = self._known()
        return signals.losses_T if step is None else signals.losses_T[step]

    @property
    def auc_T(self) -> Tensor:  # noqa: N802
        """Streaming training AUC of each task; see ``StepSignals``."""
        signals, _, step = self._known()
        return signals.auc_T if step is None else signals.auc_T[step]

    @property
    def ranking_T(self) -> Tensor | None:  # noqa: N802
        """Ranking loss of each task; see ``StepSignals``."""
        signals, _, step = self._known()
        return signals.ranking_T if step is None or signals.ranking_T is None else signals.ranking_T[step]

    def values(self) -> StepSignals:
        """All of them, on the device."""
        signals, _, step = self._known()
        if step is not None:
            parts = {name: None if value is None else value[step] for name, value in vars(signals).items()}
            signals = StepSignals(**parts)  # type: ignore[arg-type]
        return replace(signals, step_cut_3=self._cut_3)

    def know(self, signals: StepSignals, rows: Tensor, step: int | None) -> None:
        """Takes the signals over from who has computed them.

        Args:
            signals: of this batch, or of several with a leading dimension.
            rows: the same in the order of ``pack``.
            step: which of several; None for one.
        """
        self._of = signals, rows, step

    def after_step(self, step_cut: StepCut | None) -> None:
        """Adds the signal of the accumulators, which the optimizer's step has changed by now."""
        self._cut_3 = None if step_cut is None else step_cut.update()

    def packed(self) -> Tensor:
        """One row, in the order of ``ranker.stability.pack``."""
        _, rows, step = self._known()
        row = rows if step is None else rows[step]
        return row if self._cut_3 is None else with_step_cut(row, self._cut_3)

    def _known(self) -> tuple[StepSignals, Tensor, int | None]:
        if self._of is None:
            self._settle()
        assert self._of is not None
        return self._of


class DeferredSignals:
    """Collects what the signals of steps are computed from.

    A small model computes a step in the time in which some hundred kernels are started, and its signals are forty of
    them. So they are computed for several steps together. The values are those of ``step_signals`` batch by batch, to
    the bit. On a GPU, where sums of another shape may be rounded in another way, and with several ranks, which would
    have to read at the same time, nothing is kept back.

    Args:
        trained: has the training AUC.
    """

    def __init__(self, trained: Trainable) -> None:
        self._trained = trained
        self._waiting: list[tuple[Seen, LateSignals]] = []
        trained.train_auc.settle = self.settle

    def add(self, seen: Seen) -> LateSignals:
        """The signals of the batch that was just seen."""
        signals = LateSignals(self.settle)
        if seen.logits_BT.device.type != "cpu" or (dist.is_available() and dist.is_initialized()):
            found = step_signals(self._trained, **vars(seen))
            signals.know(found, found.packed(), None)
            return signals
        self._waiting.append((seen, signals))
        if len(self._waiting) >= KEPT:
            self.settle()
        return signals

    @torch.no_grad()
    def settle(self) -> None:
        """Computes the signals of all batches that wait, in their order."""
        waiting, self._waiting = self._waiting, []
        for _, group in groupby(waiting, key=lambda pair: pair[0].kind):
            pairs = list(group)
            found, rows = several_signals(self._trained, [seen for seen, _ in pairs])
            for step, (_, signals) in enumerate(pairs):
                signals.know(found, rows, step)
