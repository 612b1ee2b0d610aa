"""The divergence detector: it collects signals on the device and classifies them on the host, without waiting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ranker.errors import UserError
from ranker.stability.detector_interface import Event, Status, StepValues, pack
from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.divergence_classifier import DivergenceClassifier
from ranker.stability.step_cut import StepCut

_MAX_UNREAD_STEPS = 4096  # bounds the device memory: 7 T + 4 numbers per step


class DivergenceDetector:
    """Distinguishes micro from full divergence, from the losses, AUCs and logit spreads of all tasks at each step.

        detector = DivergenceDetector(["click", "watch_time"])
        detector.update(step, **reduce_signals(losses_T, auc_T, spread_T, nonfinite))   # every step
        for event in detector.poll(): ...                                               # every n steps
        events = detector.finish(eval_auc_T)                                            # at the end

    ``update`` launches one small kernel and does not wait for the device. The statistics are plain Python on the host,
    some microseconds per task and step. On a CPU, ``poll`` classifies all steps so far. On a GPU it classifies the
    steps up to the previous ``poll``, whose copy to the host is complete. No step is skipped, whatever the interval.

    The verdict depends only on the signals and on the sequence of calls. Ranks that are given the same signals
    (``reduce_signals``) and poll at the same steps agree.

    Args:
        task_names: names of the tasks, in the order of the signals.
        device: device on which the signals are collected; by default the device of the losses.
        step_cut: what measures the step cut; its samples become part of the detector's saved state.
        settings: fields of ``DetectorSettings``.

    Raises:
        UserError: there is no task, or a setting is out of range.
        TypeError: a setting does not exist.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        *,
        device: torch.device | str | None = None,
        step_cut: StepCut | None = None,
        **settings: Any,
    ) -> None:
        if not task_names:
            raise UserError("divergence detector: at least one task is needed")
        self.settings = DetectorSettings(**settings)
        self.task_names = tuple(task_names)
        self.step_cut = step_cut
        self.events: list[Event] = []
        self._classifier = DivergenceClassifier(self.task_names, self.settings)
        self._buffer = _SignalBuffer()
        self._device = None if device is None else torch.device(device)
        self._unreported: list[Event] = []

    @torch.no_grad()
    def update(
        self,
        step: int,
        losses_T: Tensor,
        auc_T: Tensor | None = None,
        spread_T: Tensor | None = None,
        nonfinite: Tensor | None = None,
        *,
        batch_auc_T: Tensor | None = None,
        positives_T: Tensor | None = None,
        labels_T: Tensor | None = None,
        variance_T: Tensor | None = None,
        step_cut_3: Tensor | None = None,
    ) -> None:
        """Adds the signals of a step, without waiting for the device.

        Args:
            step: number of the step, increasing.
            losses_T: unweighted loss per task over all ranks; exactly 0 where no label was observed. These and the
                other signals are described in ``Signals``.
            auc_T: running training AUC per task.
            spread_T: standard deviation of the logits per task.
            nonfinite: whether any prediction is nan or infinite.
            batch_auc_T: AUC of the batch per task.
            positives_T: positive labels of the batch per task.
            labels_T: observed labels of the batch per task.
            variance_T: variance of these labels per task.
            step_cut_3: by how much the last steps cut the step size.

        Raises:
            ValueError: the losses do not have shape [T].
        """
        if losses_T.shape != (len(self.task_names),):
            raise ValueError(f"losses_T must have shape [{len(self.task_names)}], got {list(losses_T.shape)}")
        if self._device is not None:
            losses_T = losses_T.to(self._device, non_blocking=True)
        row = pack(losses_T, auc_T, spread_T, nonfinite, batch_auc_T, positives_T, labels_T, variance_T, step_cut_3)
        self.update_late(step, lambda: row)

    def update_late(self, step: int, row: Callable[[], Tensor]) -> None:
        """Adds the signals of a step that are computed when they are first read.

        Args:
            step: number of the step, increasing.
            row: gives them in the order of ``pack``, already reduced over the ranks, on the detector's device.
        """
        self._buffer.add(step, row)
        if len(self._buffer) >= _MAX_UNREAD_STEPS:
            self._unreported += self._classify(wait=False)

    def poll(self, *, wait: bool = False) -> list[Event]:
        """The events whose verdict was reached since the last call.

        Args:
            wait: classify all steps so far, also on a GPU.
        """
        events, self._unreported = self._unreported + self._classify(wait=wait), []
        return events

    def finish(
        self, eval_auc_T: Tensor | Sequence[float] | None = None, eval_ne_T: Tensor | Sequence[float] | None = None
    ) -> list[Event]:
        """Reaches a verdict on whatever is open when training ends, and returns all events since the last call.

        Args:
            eval_auc_T: AUC per task on the hold-out, nan for regressions; decides doubtful cases.
            eval_ne_T: normalised entropy per task on the hold-out, nan for regressions.
        """
        events = self.poll(wait=True)
        unknown = [math.nan] * len(self.task_names)
        aucs, entropies = (unknown if x is None else [float(v) for v in x] for x in (eval_auc_T, eval_ne_T))
        last = self._classifier.finish(aucs, entropies)
        self.events += last
        return events + last

    @property
    def status(self) -> Status:
        """``healthy``, ``suspect`` (without a verdict yet) or ``diverged`` (full divergence), as of the last poll."""
        return self._classifier.status

    @property
    def reason(self) -> str:
        """Why the status is not healthy, in words; empty where it is."""
        return self._classifier.reason

    @property
    def suspicion(self) -> Event | None:
        """What is open, as the event it becomes if it never ends; None while healthy. As of the last poll.

        Its first step shows early which snapshots to keep: some verdicts are reached hundreds of steps later.
        """
        return self._classifier.suspicion

    @property
    def unsettled(self) -> list[Event]:
        """The events whose verdict training ended before."""
        return [event for event in self.events if event.kind == "unsettled"]

    def summary(self) -> dict[str, Any]:
        """Number of ``micro`` and ``unsettled`` events, whether there is a ``full`` one, and ``first_step`` of all."""
        found = self._classifier.ledger
        return {
            "micro": found.micro_count,
            "full": found.full_divergence is not None,
            "unsettled": found.unsettled_count,
            "first_step": found.first_step,
        }

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, tensors, lists and dicts, which load with ``weights_only=True``. Waits for the device."""
        self._unreported += self._classify(wait=True)
        return {
            "classifier": self._classifier.state_dict(),
            "unreported": [asdict(event) for event in self._unreported],
            "step_cut": self.step_cut.state_dict() if self.step_cut else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``. Steps that were added but not classified are dropped.

        Raises:
            UserError: it is the state of other tasks.
        """
        saved_tasks = list(state["classifier"]["tasks"])
        if saved_tasks != list(self.task_names):
            raise UserError(
                f"divergence detector: the checkpoint is of tasks {saved_tasks}, this run has {self.task_names}"
            )
        self._buffer = _SignalBuffer()
        self._classifier.load_state_dict(state["classifier"])
        self._unreported = [Event(**event) for event in state["unreported"]]
        if self.step_cut is not None:
            saved = state["step_cut"]
            self.step_cut.load_state_dict(saved) if saved else self.step_cut.reset()

    def _classify(self, *, wait: bool) -> list[Event]:
        events: list[Event] = []
        for step, row in self._buffer.take(wait=wait):
            events += self._classifier.update(step, StepValues.of(row))
        self.events += events
        return events


class _SignalBuffer:
    """Rows of signals on the device that are read without waiting for it.

    ``add`` keeps what gives the row. ``take`` stacks the rows in one kernel. On a CPU it returns them. On a GPU it
    starts a copy to pinned memory and returns the rows of the previous call, whose copy is complete by then. Which rows
    a call returns depends only on the sequence of calls, not on timing, so ranks that make the same calls get the same
    rows.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: list[Callable[[], Tensor]] = []
        self._copying: tuple[list[int], Tensor, torch.cuda.Event] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, row: Callable[[], Tensor]) -> None:
        """Adds what gives the row of a step."""
        self._steps.append(step)
        self._rows.append(row)

    def take(self, *, wait: bool = False) -> list[tuple[int, list[float]]]:
        """Steps and rows, in order; all of them with ``wait``."""
        taken = self._finish_copy()
        if self._rows:
            steps, rows = self._steps, torch.stack([row() for row in self._rows])
            self._steps, self._rows = [], []
            if rows.is_cuda:
                host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
                host.copy_(rows, non_blocking=True)
                done = torch.cuda.Event()
                done.record()
                self._copying = (steps, host, done)
            else:
                taken += zip(steps, rows.tolist(), strict=True)
        return taken + self._finish_copy() if wait else taken

    def _finish_copy(self) -> list[tuple[int, list[float]]]:
        if self._copying is None:
            return []
        steps, host, done = self._copying
        self._copying = None
        done.synchronize()
        return list(zip(steps, host.tolist(), strict=True))
