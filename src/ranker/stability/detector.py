"""The divergence detector: fed every step on the device, read every few steps, judged at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ranker.errors import UserError
from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.divergence_classifier import Judge
from ranker.stability.event import Event, Status
from ranker.stability.step_signals import SignalBuffer, pack

_MOST_UNREAD = 4096  # steps; 3 T + 1 numbers each


class DivergenceDetector:
    """Tells micro from full divergence, on the losses, AUCs and logit spreads of every step and every task.

        detector = DivergenceDetector(["click", "watch_time"])
        detector.update(step, **reduce_signals(losses_T, auc_T, spread_T, nonfinite))   # every step
        for event in detector.poll(): ...                                               # every n steps
        events = detector.finish(eval_auc_T)                                            # at the end

    A step costs one small kernel on the device and no waiting. The statistics are plain Python over numbers that have
    arrived on the host, some microseconds a task and step: on a GPU ``poll`` judges the steps up to the poll before,
    whose copy is long done, on CPU all of them. No step is skipped, whatever the interval.

    The verdict is a function of the signals and of the calls alone. Ranks that are fed the same (``reduce_signals``)
    and poll at the same steps agree.

    Args:
        task_names: names of the tasks, in the order of the signals.
        device: where the signals are gathered; by default where the losses are.
        settings: of ``DetectorSettings``, as keywords.

    Raises:
        UserError: no task, or a setting out of range.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        *,
        device: torch.device | str | None = None,
        window: int = DetectorSettings.window,
        jump_ratio: float = DetectorSettings.jump_ratio,
        jump_scales: float = DetectorSettings.jump_scales,
        jump_floor: float = DetectorSettings.jump_floor,
        outlier_steps: int = DetectorSettings.outlier_steps,
        lone_factor: float = DetectorSettings.lone_factor,
        max_rise: int = DetectorSettings.max_rise,
        startup: int = DetectorSettings.startup,
        settle: int = DetectorSettings.settle,
        patience: int = DetectorSettings.patience,
        lost_ratio: float = DetectorSettings.lost_ratio,
        lost_ratio_alone: float = DetectorSettings.lost_ratio_alone,
        blowup_ratio: float = DetectorSettings.blowup_ratio,
        nonfinite_patience: int = DetectorSettings.nonfinite_patience,
        dead_spread: float = DetectorSettings.dead_spread,
        dead_patience: int = DetectorSettings.dead_patience,
        unborn_patience: int = DetectorSettings.unborn_patience,
        auc_tolerance: float = DetectorSettings.auc_tolerance,
        auc_patience: int = DetectorSettings.auc_patience,
        lost_ne: float = DetectorSettings.lost_ne,
    ) -> None:
        if not task_names:
            raise UserError("divergence detector: at least one task is needed")
        self.settings = DetectorSettings(
            window=window,
            jump_ratio=jump_ratio,
            jump_scales=jump_scales,
            jump_floor=jump_floor,
            outlier_steps=outlier_steps,
            lone_factor=lone_factor,
            max_rise=max_rise,
            startup=startup,
            settle=settle,
            patience=patience,
            lost_ratio=lost_ratio,
            lost_ratio_alone=lost_ratio_alone,
            blowup_ratio=blowup_ratio,
            nonfinite_patience=nonfinite_patience,
            dead_spread=dead_spread,
            dead_patience=dead_patience,
            unborn_patience=unborn_patience,
            auc_tolerance=auc_tolerance,
            auc_patience=auc_patience,
            lost_ne=lost_ne,
        )
        self.task_names = tuple(task_names)
        self.events: list[Event] = []
        self._judge = Judge(self.task_names, self.settings)
        self._buffer = SignalBuffer()
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
    ) -> None:
        """Takes a step's signals; nothing waits for the device.

        Args:
            step: number of the step, counting up.
            losses_T: unweighted loss of each task over all ranks; exactly 0 where no label was observed.
            auc_T: running training AUC of each task; nan for regressions.
            spread_T: standard deviation of each task's logits over the batch.
            nonfinite: scalar, true where any prediction is nan or infinite.
        """
        if losses_T.shape != (len(self.task_names),):
            raise ValueError(f"losses_T must have shape [{len(self.task_names)}], got {list(losses_T.shape)}")
        if self._device is not None:
            losses_T = losses_T.to(self._device, non_blocking=True)
        self._buffer.add(step, pack(losses_T, auc_T, spread_T, nonfinite))
        if len(self._buffer) >= _MOST_UNREAD:
            self._unreported += self._read(wait=False)

    def poll(self, *, wait: bool = False) -> list[Event]:
        """Events settled since the last call.

        Args:
            wait: judge all steps fed so far, also on a GPU.
        """
        events, self._unreported = self._unreported + self._read(wait=wait), []
        return events

    def finish(
        self, eval_auc_T: Tensor | Sequence[float] | None = None, eval_ne_T: Tensor | Sequence[float] | None = None
    ) -> list[Event]:
        """Judges what is still open when training ends, however short it was.

        Args:
            eval_auc_T: AUC of each task on the hold-out, nan for regressions; settles doubtful cases.
            eval_ne_T: normalised entropy of each task on the hold-out, nan for regressions.
        """
        events = self.poll(wait=True)
        unknown = [math.nan] * len(self.task_names)
        aucs, entropies = (unknown if x is None else [float(v) for v in x] for x in (eval_auc_T, eval_ne_T))
        last = self._judge.finish(aucs, entropies)
        self.events += last
        return events + last

    @property
    def status(self) -> Status:
        """``healthy``, ``suspect`` (something is open) or ``diverged`` (a full divergence), as of the last poll."""
        return self._judge.status

    @property
    def reason(self) -> str:
        """Why the status is not healthy, in plain words; empty where it is."""
        return self._judge.reason

    @property
    def suspicion(self) -> Event | None:
        """What is open, as the event it would be if it never ended; None while healthy. As of the last poll.

        Its first step tells early which past to hold on to: some verdicts come hundreds of steps later.
        """
        return self._judge.suspicion

    def summary(self) -> dict[str, Any]:
        """``{"micro": number, "full": whether, "first_step": of the first of them or None}``."""
        judge = self._judge
        return {"micro": judge.micro, "full": judge.lost is not None, "first_step": judge.first_step}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, which load with ``weights_only=True``. Waits for the device."""
        self._unreported += self._read(wait=True)
        return {"judge": self._judge.state(), "unreported": [asdict(event) for event in self._unreported]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict``; steps that were fed but not judged are dropped.

        Raises:
            UserError: it is the state of other tasks.
        """
        there = list(state["judge"]["tasks"])
        if there != list(self.task_names):
            raise UserError(f"divergence detector: the checkpoint is of tasks {there}, this run has {self.task_names}")
        self._buffer = SignalBuffer()
        self._judge.load(state["judge"])
        self._unreported = [Event(**event) for event in state["unreported"]]

    def _read(self, *, wait: bool) -> list[Event]:
        tasks = len(self.task_names)
        events: list[Event] = []
        for step, row in self._buffer.take(wait=wait):
            losses, aucs, spreads = row[:tasks], row[tasks : 2 * tasks], row[2 * tasks : 3 * tasks]
            events += self._judge.see(step, losses, aucs, spreads, row[-1] != 0)
        self.events += events
        return events
