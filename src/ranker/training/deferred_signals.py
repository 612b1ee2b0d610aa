"""Signals of training steps that are computed for several steps at once, when somebody reads one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from ranker.stability.step_cut import StepCut
from ranker.training.training_step import Seen, StepSignals, Trainable, several_signals, step_signals

KEPT = 16  # batches, at most, whose signals are not computed yet


class LateSignals:
    """The signals of one batch. Reading them computes those of all batches that wait.

    Attributes:
        values: the signals; they are there from the first time that they are asked for.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self._values: StepSignals | None = None
        self._cut_3: Tensor | None = None

    @property
    def is_known(self) -> bool:
        """Whether reading costs nothing any more."""
        return self._values is not None

    @property
    def values(self) -> StepSignals:
        """The signals, on the device."""
        if self._values is None:
            self._settle()
        assert self._values is not None
        return self._values if self._cut_3 is None else replace(self._values, step_cut_3=self._cut_3)

    @property
    def losses_T(self) -> Tensor:
        """Loss of each task; see ``StepSignals``."""
        return self.values.losses_T

    @property
    def auc_T(self) -> Tensor:
        """Streaming training AUC of each task; see ``StepSignals``."""
        return self.values.auc_T

    @property
    def ranking_T(self) -> Tensor | None:
        """Ranking loss of each task; see ``StepSignals``."""
        return self.values.ranking_T

    def know(self, values: StepSignals) -> None:
        """Takes the signals over from who has computed them."""
        self._values = values

    def after_step(self, step_cut: StepCut | None) -> None:
        """Adds the signal of the accumulators, which the optimizer's step has changed by now."""
        self._cut_3 = None if step_cut is None else step_cut.update()

    def packed(self) -> Tensor:
        """One row, in the order of ``ranker.stability.pack``."""
        return self.values.packed()


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
            signals.know(step_signals(self._trained, **vars(seen)))
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
            for (_, signals), values in zip(pairs, several_signals(self._trained, [s for s, _ in pairs]), strict=True):
                signals.know(values)
