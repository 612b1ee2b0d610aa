"""The state machine that classifies a run, step by step, as healthy, micro divergence or full divergence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ranker.stability.auc_tracker import AucTracker, Streak, auc_above_chance
from ranker.stability.detector_interface import DetectorSettings, Event, Kind, Status
from ranker.stability.task_state import TaskState

_RECOVERED = 0.75  # in thresholds above the baseline; below 1, so that a loss at the threshold does not flicker
_NOT_FINITE = "losses or predictions are infinite or nan"
_CONSTANT = "predictions no longer depend on the input (each task gives every row the same)"


@dataclass
class LossSpike:
    """A spike of the losses, from its first step until the verdict.

    Attributes:
        step: first step.
        task: name of the task whose loss moved first; empty where only predictions were not finite.
        depth: highest ratio of a loss to its baseline so far; infinite where a loss or prediction was not finite.
        startup: whether it began in the first steps, where a spike that recovers is not an event.
        worst: name of the task with the highest ratio.
        ratio_to_first: highest ratio of a loss to the task's first loss so far.
        calm_steps: number of consecutive steps below the threshold.
        calm_since: first of these steps.
    """

    step: int
    task: str
    depth: float
    startup: bool
    worst: str = ""
    ratio_to_first: float = 1.0
    calm_steps: int = 0
    calm_since: int = 0

    def update(self, step: int, tasks: Sequence[TaskState], *, nonfinite: bool, constant: bool) -> None:
        """Updates depth and recovery with a step.

        Args:
            step: number of the step.
            tasks: state of the tasks after this step.
            nonfinite: a loss or prediction is not finite.
            constant: predictions do not depend on the input; a loss that is low because of that has not recovered.
        """
        for task in tasks:
            self.ratio_to_first = max(self.ratio_to_first, task.ratio_to_first)
            if task.excess > 1.0 and task.ratio > self.depth:
                self.depth, self.worst = task.ratio, task.name
        if nonfinite:
            self.depth = self.ratio_to_first = math.inf
        if nonfinite or constant or any(t.excess > _RECOVERED for t in tasks):
            self.calm_steps = 0
            return
        self.calm_since = self.calm_since if self.calm_steps else step
        self.calm_steps += 1

    def has_recovered(self, tasks: Sequence[TaskState], settings: DetectorSettings) -> bool:
        """Whether all losses have been low for ``settle`` steps, and none is rising slowly."""
        return self.calm_steps >= settings.settle and all(t.median_excess <= _RECOVERED for t in tasks)

    def __str__(self) -> str:
        worst = self.worst or self.task
        who = f"the loss of {worst}" if worst else "a prediction"
        how = f"jumped to {self.depth:.3g}x its past" if math.isfinite(self.depth) else "became infinite or nan"
        first = f" (task {self.task} moved first)" if self.task not in ("", worst) else ""
        return f"{who} {how} at step {self.step}{first}"


class DivergenceClassifier:
    """Classifies a run from the signals of its steps, given as numbers, one step after another.

    Args:
        task_names: names of the tasks, in the order of the signals.
        settings: thresholds and patience.

    Attributes:
        tasks: state per task.
        spike: the open spike, if any.
        full_divergence: the full divergence, if any; after it nothing changes.
        micro_count: number of spikes that recovered.
        first_step: first step of the earliest divergence.
    """

    def __init__(self, task_names: Sequence[str], settings: DetectorSettings) -> None:
        self._settings = settings
        self.tasks = [TaskState(name, settings) for name in task_names]
        self.spike: LossSpike | None = None
        self.full_divergence: Event | None = None
        self.micro_count = 0
        self.first_step: int | None = None
        self._step_count = 0
        self._step = 0  # number of the last step, which need not be the number of steps
        self._blowup: LossSpike | None = None  # first blow-up; the start of the divergence if nothing is learned after
        self._last_spike: LossSpike | None = None  # the last spike that has ended
        self._auc = AucTracker(settings)
        self._was_varied = False  # predictions did depend on the input at some step
        self._constant = Streak()  # predictions do not depend on the input
        self._nonfinite = Streak()

    @property
    def status(self) -> Status:
        """``diverged`` after a full divergence; ``suspect`` while something is open."""
        if self.full_divergence is not None:
            return "diverged"
        return "suspect" if self.reason else "healthy"

    @property
    def reason(self) -> str:
        """Why the status is not healthy; empty where it is."""
        if self.full_divergence is not None:
            return self.full_divergence.reason
        if self.spike is not None:
            return self._not_recovered(self.spike)
        if self._constant.length and self._was_varied:
            return f"{_CONSTANT} since step {self._constant.since}"
        if self._auc.learned and self._auc.at_chance.length:
            return f"training AUC is back at 0.5 since step {self._auc.at_chance.since}"
        return ""

    @property
    def suspicion(self) -> Event | None:
        """What is open, as the event it becomes if it never ends; None where nothing is open.

        A spike in the first steps that did not blow up has kind ``shift``, which is not a divergence.
        """
        if self.full_divergence is not None:
            return self.full_divergence
        spike, reason = self.spike, self.reason
        harmless = spike is not None and spike.startup and spike.ratio_to_first < self._settings.blowup_ratio
        if (harmless or not reason) and self._blowup is not None and not self._auc.learned:
            spike, harmless, reason = self._blowup, False, f"{self._blowup} and nothing has been learned since"
        elif spike is None and reason:
            constant = self._constant.length and self._was_varied
            since = (self._constant if constant else self._auc.at_chance).since
            spike = LossSpike(step=since, task="", depth=1.0, startup=False)
        if spike is None:
            return None
        return self._event("shift" if harmless else "full", spike, None, reason)

    def update(
        self, step: int, losses: Sequence[float], aucs: Sequence[float], spreads: Sequence[float], nonfinite: bool
    ) -> list[Event]:
        """Takes the signals of a step; returns the events whose verdict is reached. Empty after a full divergence.

        Args:
            step: number of the step.
            losses: loss per task; 0 where no label was observed.
            aucs: training AUC per task; nan where there is none.
            spreads: standard deviation of the logits per task; nan where it is unknown.
            nonfinite: a prediction is not finite.
        """
        if self.full_divergence is not None:
            return []
        s = self._settings
        self._step, self._step_count = step, self._step_count + 1
        for task, loss, auc in zip(self.tasks, losses, aucs, strict=True):
            task.update(step, loss, auc)
        nonfinite = nonfinite or not all(map(math.isfinite, losses))
        widest = max((x for x in spreads if not math.isnan(x)), default=math.nan)
        self._was_varied |= widest > 10.0 * s.dead_spread
        self._nonfinite.update(step, nonfinite)
        self._constant.update(step, widest < s.dead_spread)
        if self._step_count > s.startup:
            self._auc.update(step, auc_above_chance(self.tasks, aucs, s))
        self._update_spike(step, losses, nonfinite)
        full = self._check_full_divergence()
        return [full] if full else self._check_spike()

    def finish(self, eval_aucs: Sequence[float], eval_nes: Sequence[float] = ()) -> list[Event]:
        """Reaches a verdict on whatever is open at the end of training.

        Args:
            eval_aucs: AUC per task on the hold-out; nan for regressions, and where it is unknown.
            eval_nes: normalised entropy per task, likewise.
        """
        if self.full_divergence is not None or not self._step_count:
            return []
        s = self._settings
        long_enough = self._step_count >= 2 * s.startup
        if long_enough and (entropy := _entropy_of_useless_model(eval_aucs, eval_nes, s)):
            self.spike = self.spike or self._blowup
            return [
                self._diverge(f"AUC on the hold-out is at 0.5, log loss {entropy:.3g}x that of the base rate", None)
            ]
        held_out = auc_above_chance(self.tasks, eval_aucs, s)
        if held_out >= 1.5 * s.auc_tolerance and not self._constant.length:
            # A model that ranks the hold-out well is not lost, whatever was open when training ended.
            return self._end_spike()
        if self._nonfinite.length:
            return [self._diverge(_NOT_FINITE, self._nonfinite.since)]
        if self._constant.length >= s.settle and (self._was_varied or self._blowup):
            return [self._diverge(_CONSTANT, self._constant.since)]
        if self.spike is not None and not self.spike.calm_steps:
            return [self._diverge(self._not_recovered(self.spike), self.spike.step)]
        if self._auc.learned and self._auc.at_chance.length >= s.settle:
            return [self._diverge_auc_lost()]
        if self._blowup and not self._auc.learned and long_enough:
            training = math.isnan(held_out)
            known = auc_above_chance(self.tasks, [t.auc for t in self.tasks], s) if training else held_out
            if known < s.auc_tolerance:
                return [self._diverge_nothing_learned("training AUC" if training else "AUC on the hold-out")]
        return self._end_spike()

    def _update_spike(self, step: int, losses: Sequence[float], nonfinite: bool) -> None:
        """Opens a spike or updates the open one; without a spike, updates the baselines."""
        if self.spike is None:
            self.spike = self._detect_spike(step, nonfinite)
        if self.spike is not None:
            if self._blowup is None and self.spike.ratio_to_first >= self._settings.blowup_ratio:
                self._blowup = self.spike
            constant = self._constant.length > 0 and self._was_varied
            self.spike.update(step, self.tasks, nonfinite=nonfinite, constant=constant)
            return
        for task, loss in zip(self.tasks, losses, strict=True):
            task.update_baseline(loss)

    def _detect_spike(self, step: int, nonfinite: bool) -> LossSpike | None:
        """A new spike, if a loss is above its threshold or a value is not finite.

        At least half of the tasks must have moved (two, where there are two), or the spike must last. A few outlier
        rows in heavy-tailed data raise the loss of a regression or two for one step, by more than many divergences do,
        whereas a move of the shared layers affects most tasks. The spike begins where the first of the tasks rose above
        its baseline and stayed there, so waiting does not change its first step. In the first steps, where a spike by
        itself is not an event, any high loss opens one: what counts is whether the model learns after it.
        """
        tasks, s = self.tasks, self._settings
        startup = self._step_count <= s.startup
        high, rising = [t for t in tasks if t.excess > 1.0], [t for t in tasks if t.median_excess > 1.0]
        if not (nonfinite or high or rising):
            return None
        moved = [(t.high_since, -t.excess, t.name) for t in tasks if t.high_since is not None]
        first, _, name = min(moved + [(step, -t.median_excess, t.name) for t in rising], default=(step, 0.0, ""))
        lasts = rising or any(t.high_since is not None and step - t.high_since + 1 >= s.outlier_steps for t in high)
        broad = tasks[0].excess >= s.lone_factor if len(tasks) == 1 else 2 * len(moved) >= max(len(tasks), 4)
        if not (nonfinite or startup or lasts or (high and broad)):
            return None
        return LossSpike(step=first, task=name, depth=1.0, startup=startup)

    def _check_full_divergence(self) -> Event | None:
        s, steps_at_chance = self._settings, self._auc.at_chance.length
        if self._nonfinite.length >= s.nonfinite_patience:
            return self._diverge(_NOT_FINITE, self._nonfinite.since)
        if self._constant.length >= (s.dead_patience if self._was_varied else s.unborn_patience):
            return self._diverge(_CONSTANT, self._constant.since)
        if self._auc.learned and steps_at_chance >= s.auc_patience:
            return self._diverge_auc_lost()
        if self._blowup and not self._auc.learned and steps_at_chance >= s.auc_patience:
            return self._diverge_nothing_learned("training AUC")
        return None

    def _check_spike(self) -> list[Event]:
        """Ends the open spike where it has recovered or has lasted too long."""
        spike, s = self.spike, self._settings
        if spike is None:
            return []
        if spike.has_recovered(self.tasks, s):
            return self._end_spike()
        if self._step - spike.step < s.patience:
            return []
        if self._losses_are_lost():
            return [self._diverge(self._not_recovered(spike), spike.step)]
        for task in self.tasks:
            if max(task.excess, task.median_excess) > 0.5:
                task.baseline.restart(list(task.recent))
        self.spike = None
        text = f"{spike} and has stayed for {self._step - spike.step} steps; taken for a new level of the data"
        return [self._record("shift", spike, None, text)]

    def _losses_are_lost(self) -> bool:
        """Whether losses that stay high mean a lost model: most of them are high, or one is very high."""
        s = self._settings
        ratios = [t.median_ratio for t in self.tasks if max(t.excess, t.median_excess) > _RECOVERED]
        if any(r >= s.lost_ratio_alone for r in ratios):
            return True
        return 2 * sum(r >= s.lost_ratio for r in ratios) > len(self.tasks)

    def _end_spike(self) -> list[Event]:
        spike, self.spike = self.spike, None
        if spike is None:
            return []
        self._last_spike = spike
        if spike.startup:
            return []
        self.micro_count += 1
        if not spike.calm_steps:
            return [self._record("micro", spike, None, f"{spike} and had not come back when training ended")]
        text = f"{spike} and came back in {spike.calm_since - spike.step} steps"
        return [self._record("micro", spike, spike.calm_since, text)]

    def _diverge_auc_lost(self) -> Event:
        since, last = self._auc.at_chance.since, self._last_spike
        if last is not None and 0 <= since - last.calm_since <= self._settings.auc_patience:
            self.spike = self.spike or last  # the AUC is an average over past steps, so it falls some steps later
        return self._diverge(f"training AUC is back at 0.5, down from {0.5 + self._auc.best:.3f} on average,", since)

    def _diverge_nothing_learned(self, what: str) -> Event:
        self.spike = self._blowup
        return self._diverge(f"{what} is at 0.5 after {self._step_count} steps, no task was learned", None)

    def _diverge(self, reason: str, since: int | None) -> Event:
        """Records the full divergence. It began with the open spike if there is one, otherwise at step ``since``."""
        spike = self.spike or LossSpike(step=since or 1, task="", depth=1.0, startup=False)
        if since is not None and since != spike.step:
            reason = f"{reason} since step {since}"
        if self.spike is not None and not reason.startswith(str(spike)):
            reason = f"{spike}; {reason}"
        self.full_divergence = self._record("full", spike, None, reason)
        return self.full_divergence

    def _record(self, kind: Kind, spike: LossSpike, recovered_at: int | None, reason: str) -> Event:
        if kind != "shift":
            self.first_step = spike.step if self.first_step is None else min(self.first_step, spike.step)
        return self._event(kind, spike, recovered_at, reason)

    def _event(self, kind: Kind, spike: LossSpike, recovered_at: int | None, reason: str) -> Event:
        return Event(
            kind=kind,
            step=spike.step,
            task=spike.task,
            depth=spike.depth,
            length=(self._step if recovered_at is None else recovered_at) - spike.step,
            recovered_at=recovered_at,
            judged_at=self._step,
            reason=reason,
        )

    def _not_recovered(self, spike: LossSpike) -> str:
        return f"{spike} and has not come back for {self._step - spike.step} steps"

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings, lists and dicts."""
        spikes = {"open": self.spike, "blowup": self._blowup, "last": self._last_spike}
        return {
            "tasks": {task.name: task.state_dict() for task in self.tasks},
            "spikes": {name: asdict(spike) if spike else None for name, spike in spikes.items()},
            "full_divergence": asdict(self.full_divergence) if self.full_divergence else None,
            "micro_count": self.micro_count,
            "first_step": self.first_step,
            "step_count": self._step_count,
            "step": self._step,
            "auc": self._auc.state_dict(),
            "was_varied": self._was_varied,
            "constant": asdict(self._constant),
            "nonfinite": asdict(self._nonfinite),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()`` of a classifier of the same tasks."""
        for task in self.tasks:
            task.load_state_dict(state["tasks"][task.name])
        spikes = {name: LossSpike(**spike) if spike else None for name, spike in state["spikes"].items()}
        self.spike, self._blowup, self._last_spike = spikes["open"], spikes["blowup"], spikes["last"]
        if self.spike is not None and self._blowup is not None and self.spike.step == self._blowup.step:
            self._blowup = self.spike  # the same object while the spike is open
        self.full_divergence = Event(**state["full_divergence"]) if state["full_divergence"] else None
        self.micro_count, self.first_step = state["micro_count"], state["first_step"]
        self._step_count, self._step, self._was_varied = state["step_count"], state["step"], state["was_varied"]
        self._auc.load_state_dict(state["auc"])
        self._constant, self._nonfinite = Streak(**state["constant"]), Streak(**state["nonfinite"])


def _entropy_of_useless_model(aucs: Sequence[float], nes: Sequence[float], settings: DetectorSettings) -> float:
    """The median normalised entropy on the hold-out, if it and the AUCs show that the model is lost; otherwise 0.

    Medians, so that neither the noisy AUC of a rare task nor one badly calibrated task decides.
    """
    aucs, nes = ([x for x in values if not math.isnan(x)] for values in (aucs, nes))
    if not aucs or not nes or statistics.median(aucs) >= 0.5 + 2.0 * settings.auc_tolerance:
        return 0.0
    entropy = statistics.median(nes)
    return entropy if entropy >= settings.lost_ne else 0.0
