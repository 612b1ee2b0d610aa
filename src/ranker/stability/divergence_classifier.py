"""The state machine that classifies a run, step by step, as healthy, micro divergence or full divergence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ranker.stability.auc_tracker import AucTracker, Streak, auc_above_chance
from ranker.stability.detector_interface import DetectorSettings, Event, Kind, Status, StepValues
from ranker.stability.loss_spike import RECOVERED, LossSpike, Probation
from ranker.stability.skill import Skill
from ranker.stability.task_state import TaskState

_CERTAIN_AT_ONCE = 5.0  # standard errors for the fast verdict, which looks at every step and is not taken back
_NOT_FINITE = "losses or predictions are infinite or nan"
_CONSTANT = "predictions no longer depend on the input (each task gives every row the same)"


class DivergenceClassifier:
    """Classifies a run from the signals of its steps, given as numbers, one step after another.

    Args:
        task_names: names of the tasks, in the order of the signals.
        settings: thresholds and patience.

    Attributes:
        tasks: state per task.
        spike: the open spike, if any.
        probation: the spikes that are over but not settled, if any.
        full_divergence: the full divergence, if any; after it nothing changes.
        micro_count: number of spikes that recovered.
        unsettled_count: number of spikes of which it is not known, because training ended.
        first_step: first step of the earliest divergence.
    """

    def __init__(self, task_names: Sequence[str], settings: DetectorSettings) -> None:
        self._settings = settings
        self.tasks = [TaskState(name, settings) for name in task_names]
        self.spike: LossSpike | None = None
        self.full_divergence: Event | None = None
        self.probation: Probation | None = None
        self.micro_count = self.unsettled_count = 0
        self.first_step: int | None = None
        self._step_count = 0
        self._step = 0  # number of the last step, which need not be the number of steps
        self._blowup: LossSpike | None = None  # first blow-up; the start of the divergence if nothing is learned after
        self._last_spike: LossSpike | None = None  # the last spike that has ended
        self._before: list[Skill] = []  # skill per task before the open spike
        self._cut = math.nan  # largest step cut since the first open or unsettled spike began
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
        if self.probation is not None:
            return f"{self._came_back(self.probation.spikes[-1])}; whether what was learned came back is not known yet"
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
        spike, reason = self._first_open(), self.reason
        harmless = spike is not None and spike.startup and spike.ratio_to_untrained < self._settings.blowup_ratio
        if (harmless or not reason) and self._blowup is not None and not self._auc.learned:
            spike, harmless, reason = self._blowup, False, f"{self._blowup} and nothing has been learned since"
        elif spike is None and reason:
            constant = self._constant.length and self._was_varied
            since = (self._constant if constant else self._auc.at_chance).since
            spike = LossSpike(step=since, task="", depth=1.0, startup=False)
        if spike is None:
            return None
        return self._event("shift" if harmless else "full", spike, None, reason)

    def update(self, step: int, values: StepValues) -> list[Event]:
        """Takes the signals of a step; returns the events whose verdict is reached. Empty after a full divergence."""
        if self.full_divergence is not None:
            return []
        s = self._settings
        self._step, self._step_count = step, self._step_count + 1
        for i, task in enumerate(self.tasks):
            task.update(step, values.losses[i], values.aucs[i], values.labels[i], values.positives[i])
            task.skill.add(
                step,
                loss=values.losses[i],
                auc=values.batch_aucs[i],
                positives=values.positives[i],
                labels=values.labels[i],
                variance=values.variances[i],
            )
        nonfinite = values.nonfinite or not all(map(math.isfinite, values.losses))
        widest = max((x for x in values.spreads if not math.isnan(x)), default=math.nan)
        self._was_varied |= widest > 10.0 * s.dead_spread
        self._nonfinite.update(step, nonfinite)
        self._constant.update(step, widest < s.dead_spread)
        if self._step_count > s.startup:
            self._auc.update(step, auc_above_chance(self.tasks, values.aucs, s))
        self._update_spike(step, nonfinite)
        self._update_cut(values.worst_cut)
        full = self._check_full_divergence() or self._check_step_cut()
        return [full] if full else self._check_spike() + self._check_probation()

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
        if (judged := self._judge_by_holdout(eval_aucs)) is not None:
            return judged
        held_out = auc_above_chance(self.tasks, eval_aucs, s)
        first = self._first_open()
        had_learned = first is not None and not first.startup and self._skill_was_known()
        if not had_learned and held_out >= 1.5 * s.auc_tolerance and not self._constant.length:
            # A model that ranks the hold-out well is not lost, whatever was open when training ended.
            return self._end_spike()
        if self._nonfinite.length:
            return [self._diverge(_NOT_FINITE, self._nonfinite.since)]
        if self._constant.length >= s.settle and (self._was_varied or self._blowup):
            return [self._diverge(_CONSTANT, self._constant.since)]
        if self.spike is not None and not self.spike.calm_steps and self._step - self.spike.step >= s.settle:
            return [self._diverge(self._not_recovered(self.spike), self.spike.step)]
        if self._auc.learned and self._auc.at_chance.length >= s.settle:
            return [self._diverge_auc_lost()]
        if self._blowup and not self._auc.learned and long_enough:
            training = math.isnan(held_out)
            known = auc_above_chance(self.tasks, [t.auc for t in self.tasks], s) if training else held_out
            if known < s.auc_tolerance:
                return [self._diverge_nothing_learned("training AUC" if training else "AUC on the hold-out")]
        return self._leave_unsettled()

    def _skill_was_known(self) -> bool:
        """Whether the skill before the open or unsettled spikes is known of a task."""
        return any(skill.is_known for skill in self._skill_before())

    def _skill_before(self) -> list[Skill]:
        return self.probation.before if self.probation else self._before if self.spike else []

    def _first_open(self) -> LossSpike | None:
        """The first of the spikes that are open or unsettled."""
        return self.probation.spikes[0] if self.probation else self.spike

    def _judge_by_holdout(self, eval_aucs: Sequence[float]) -> list[Event] | None:
        """The verdict on open or unsettled spikes where the hold-out shows it; otherwise None.

        The rows of the hold-out are others than those before the spike, and may be harder to rank. Learning is gone
        where less than half is left, and it is back by the tolerance that holds during training.
        """
        spike = self._first_open()
        if spike is None or spike.startup or not self._skill_was_known():
            return None
        compared = [
            (task, before, Skill(auc=auc, pairs=before.pairs))
            for task, before, auc in zip(self.tasks, self._skill_before(), eval_aucs, strict=True)
            if not math.isnan(auc) and not math.isnan(before.auc)
        ]
        for task, before, now in compared:
            if now.lost_half_of_auc(before, self._settings):
                what = f"the AUC of {task.name} did not: {before.auc:.3f} before, {now.auc:.3f} on the hold-out"
                return [self._diverge(self._but(what), None)]
        if not compared or any(now.lost_auc(before, self._settings) for _, before, now in compared):
            return None
        if self._constant.length or self._nonfinite.length:
            return None
        return self._end_spike(proven=True) + self._settle()

    def _leave_unsettled(self) -> list[Event]:
        """Says of open or unsettled spikes that training ended before their verdict."""
        spike, self.spike = self.spike, None
        pending = self.probation.spikes if self.probation else []
        self.probation = None
        if spike is not None and spike.calm_steps and not any(x.is_known for x in self._before):
            self.spike = spike  # the loss is all that is known, and it came back
            return self._end_spike()
        if spike is not None and not (spike.startup and spike.ratio_to_untrained < self._settings.blowup_ratio):
            pending = [*pending, spike]
        self.unsettled_count += len(pending)
        ended = "training ended before it was known whether the model recovered"
        return [self._record("unsettled", x, x.calm_since if x.calm_steps else None, f"{x}; {ended}") for x in pending]

    def _update_cut(self, cut: float) -> None:
        """Keeps the largest step cut while a spike is open or unsettled."""
        if self.spike is None and self.probation is None:
            self._cut = math.nan
        elif not math.isnan(cut):
            self._cut = cut if math.isnan(self._cut) else max(self._cut, cut)

    def _update_spike(self, step: int, nonfinite: bool) -> None:
        """Opens a spike or updates the open one; without a spike, updates the baselines."""
        if self.spike is None:
            self.spike = self._detect_spike(step, nonfinite)
            if self.spike is not None:
                last = self.spike.step - 1
                first = last - 2 * self._settings.proof_steps + 1
                self._before = [task.skill.between(first, last) for task in self.tasks]
        if self.spike is not None:
            if self._blowup is None and self.spike.ratio_to_untrained >= self._settings.blowup_ratio:
                self._blowup = self.spike
            constant = self._constant.length > 0 and self._was_varied
            self.spike.update(step, self.tasks, nonfinite=nonfinite, constant=constant)
            return
        for task in self.tasks:
            task.update_baseline()

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
        lasts = rising or any(t.high_count >= s.outlier_steps for t in high)
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

    def _check_step_cut(self) -> Event | None:
        """The fast verdict: a spike has cut the step size of a layer, and the AUC of a task is lost.

        Adagrad's step size does not come back. So what was lost is not learned again soon, and there is no reason to
        wait. A cut alone is not enough: a spike that makes all steps small may leave the weights as good as they were.
        """
        s, spike = self._settings, self._first_open()
        if spike is None or spike.startup or not self._cut >= s.lost_step_cut:
            return None
        if self._step - spike.step + 1 < s.fast_steps:
            return None
        first = max(spike.step, self._step - 2 * s.fast_steps + 1)
        for task, before in zip(self.tasks, self._skill_before(), strict=True):
            now = task.skill.between(first, self._step)
            if now.lost_auc(before, s, errors=_CERTAIN_AT_ONCE):
                cut = f"the step size of the median coordinate of a layer was cut {self._cut:.3g} times"
                fell = f"the AUC of {task.name} fell from {before.auc:.3f} to {now.auc:.3f}"
                return self._diverge(f"{spike}; {cut} and {fell} within {self._step - spike.step + 1} steps", None)
        return None

    def _check_probation(self) -> list[Event]:
        """Settles the spikes that are over: micro as soon as the skill is back, full if it is not in time."""
        s, probation = self._settings, self.probation
        if probation is None or self.spike is not None or self._step - probation.since + 1 < s.proof_steps:
            return []
        lost = self._what_was_lost(probation.before)
        if not lost:
            # A model that had learned nothing loses nothing, but after a blow-up it may never learn.
            blown_up = self._blowup is not None and self._blowup.step == probation.spikes[0].step
            if blown_up and not self._auc.learned and self._auc.at_chance.length and self._step < probation.deadline:
                return []
            return self._settle()
        if self._step < probation.deadline:
            return []
        return [self._diverge(self._but(f"{lost} after {self._step - probation.since + 1} steps"), None)]

    def _what_was_lost(self, before: Sequence[Skill]) -> str:
        """Which task's skill is not what it was, in words; empty where all are."""
        first = self._step - self._settings.proof_steps + 1
        for task, was in zip(self.tasks, before, strict=True):
            now = task.skill.between(first, self._step)
            if now.lost_auc(was, self._settings):
                return f"the AUC of {task.name} did not: {was.auc:.3f} before, {now.auc:.3f}"
            if now.lost_fit(was):
                worth = f"{was.relative_loss:.3f} before, {now.relative_loss:.3f}"
                return f"the loss of {task.name} beside that of a constant prediction did not: {worth}"
        return ""

    def _but(self, what: str) -> str:
        """What came back and what did not, of the open or unsettled spikes."""
        spike = self.probation.spikes[-1] if self.probation else self.spike
        assert spike is not None
        return f"{self._came_back(spike)}, {what}"

    def _came_back(self, spike: LossSpike) -> str:
        if not spike.calm_steps:
            return f"{spike} and had not come back when training ended"
        return f"{spike}; the loss came back after {spike.calm_since - spike.step} steps"

    def _check_spike(self) -> list[Event]:
        """Ends the open spike where it has recovered or has lasted too long."""
        spike, s = self.spike, self._settings
        if spike is None:
            return []
        if spike.has_recovered(self.tasks, s):
            return self._end_spike()
        if self._step - spike.step < s.patience:
            return []
        if self._losses_are_lost() or spike.depth >= s.blowup_ratio:
            return [self._diverge(self._not_recovered(spike), spike.step)]
        if (lost := self._what_was_lost(self._before)) or (lost := self._worse_than_constant()):
            return [self._diverge(f"{self._not_recovered(spike)}; {lost}", spike.step)]
        for task in self.tasks:
            if max(task.excess, task.median_excess) > 0.5:
                task.baseline.restart(list(task.recent))
        self.spike = None
        text = f"{spike} and has stayed for {self._step - spike.step} steps; taken for a new level of the data"
        return [self._record("shift", spike, None, text)]

    def _losses_are_lost(self) -> bool:
        """Whether losses that stay high mean a lost model: most of them are high, or one is very high."""
        s = self._settings
        ratios = [t.median_ratio for t in self.tasks if max(t.excess, t.median_excess) > RECOVERED]
        if any(r >= s.lost_ratio_alone for r in ratios):
            return True
        return 2 * sum(r >= s.lost_ratio for r in ratios) > len(self.tasks)

    def _worse_than_constant(self) -> str:
        """A task whose loss is high, and no better than that of a constant prediction, in words; or nothing."""
        first = self._step - self._settings.proof_steps + 1
        for task in self.tasks:
            now = task.skill.between(first, self._step)
            if max(task.excess, task.median_excess) > 0.5 and now.relative_loss - 3.0 * now.noise >= 1.0:
                return f"the loss of {task.name} is {now.relative_loss:.3g}x that of a constant prediction"
        return ""

    def _end_spike(self, *, proven: bool = False) -> list[Event]:
        """Ends the open spike: micro where nothing but the loss is known or all is ``proven``, otherwise probation."""
        spike, self.spike = self.spike, None
        if spike is None:
            return []
        self._last_spike = spike
        if spike.startup or (spike.calm_steps and not spike.is_event(self._settings)):
            return []
        s, known = self._settings, any(skill.is_known for skill in self._before)
        if self.probation is not None:
            self.probation.spikes.append(spike)
            self.probation.since = max(spike.calm_since, self.probation.since)
            return []
        if known and not proven:
            since = spike.calm_since
            self.probation = Probation([spike], self._before, since, since + s.recovery_steps - 1)
            return []
        return [self._micro(spike)]

    def _settle(self) -> list[Event]:
        """All spikes of the probation were micro divergences."""
        probation, self.probation = self.probation, None
        return [self._micro(spike) for spike in probation.spikes] if probation else []

    def _micro(self, spike: LossSpike) -> Event:
        self.micro_count += 1
        if not spike.calm_steps:
            return self._record("micro", spike, None, f"{spike} and had not come back when training ended")
        text = f"{spike} and came back in {spike.calm_since - spike.step} steps"
        return self._record("micro", spike, spike.calm_since, text)

    def _diverge_auc_lost(self) -> Event:
        since, last = self._auc.at_chance.since, self._last_spike
        if last is not None and 0 <= since - last.calm_since <= self._settings.auc_patience:
            self.spike = self.spike or last  # the AUC is an average over past steps, so it falls some steps later
        return self._diverge(f"training AUC is back at 0.5, down from {0.5 + self._auc.best:.3f} on average,", since)

    def _diverge_nothing_learned(self, what: str) -> Event:
        self.spike, self.probation = self._blowup, None
        return self._diverge(f"{what} is at 0.5 after {self._step_count} steps, no task was learned", None)

    def _diverge(self, reason: str, since: int | None) -> Event:
        """Records the full divergence. It began with the first spike that is open or unsettled, or at ``since``."""
        open_spike = self._first_open()
        spike = open_spike or LossSpike(step=since or 1, task="", depth=1.0, startup=False)
        if since is not None and since != spike.step:
            reason = f"{reason} since step {since}"
        named = [*(self.probation.spikes if self.probation else []), spike]
        if open_spike is not None and not any(reason.startswith(str(x)) for x in named):
            reason = f"{spike}; {reason}"
        self.probation = None
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
            "before": [asdict(skill) for skill in self._before],
            "probation": self.probation.state_dict() if self.probation else None,
            "cut": self._cut,
            "micro_count": self.micro_count,
            "unsettled_count": self.unsettled_count,
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
        self._before = [Skill(**skill) for skill in state["before"]]
        self.probation = Probation.of(state["probation"]) if state["probation"] else None
        self._cut, self.unsettled_count = state["cut"], state["unsettled_count"]
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
