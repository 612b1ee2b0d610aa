"""The state machine that classifies a run, step by step, as healthy, micro divergence or full divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ranker.stability.auc_tracker import AucTracker, Streak, auc_above_chance
from ranker.stability.detector_interface import Event, Status, StepValues
from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.event_ledger import EventLedger, came_back, event, not_recovered
from ranker.stability.loss_spike import LossSpike, Probation
from ranker.stability.open_spikes import OpenSpikes
from ranker.stability.skill import Skill
from ranker.stability.spike_evidence import (
    detect_spike,
    entropy_of_useless_model,
    losses_are_lost,
    what_was_lost,
    worse_than_constant,
)
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
        open: the spikes that are not settled.
        ledger: makes the events and counts them. After a full divergence nothing changes.
    """

    def __init__(self, task_names: Sequence[str], settings: DetectorSettings) -> None:
        self._settings = settings
        self.tasks = [TaskState(name, settings) for name in task_names]
        self.open = OpenSpikes(settings)
        self.ledger = EventLedger()
        self._step_count = 0
        self._step = 0  # number of the last step, which need not be the number of steps
        self._auc = AucTracker(settings)
        self._was_varied = False  # predictions did depend on the input at some step
        self._constant = Streak()  # predictions do not depend on the input
        self._nonfinite = Streak()

    @property
    def status(self) -> Status:
        """``diverged`` after a full divergence; ``suspect`` while something is open."""
        if self.ledger.full_divergence is not None:
            return "diverged"
        return "suspect" if self.reason else "healthy"

    @property
    def reason(self) -> str:
        """Why the status is not healthy; empty where it is."""
        if self.ledger.full_divergence is not None:
            return self.ledger.full_divergence.reason
        if self.open.spike is not None:
            return not_recovered(self.open.spike, self._step)
        if self.open.probation is not None:
            last = self.open.probation.spikes[-1]
            return f"{came_back(last)}; whether what was learned came back is not known yet"
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
        if self.ledger.full_divergence is not None:
            return self.ledger.full_divergence
        spikes, reason = self.open.every, self.reason
        harmless = bool(spikes) and self.open.is_harmless(spikes[0])
        if (harmless or not reason) and self.open.blowup is not None and not self._auc.learned:
            spikes, harmless = self.open.since_blowup(), False
            reason = f"{self.open.blowup} and nothing has been learned since"
        elif not spikes and reason:
            constant = self._constant.length and self._was_varied
            since = (self._constant if constant else self._auc.at_chance).since
            spikes = [LossSpike(step=since, task="", depth=1.0, startup=False)]
        return event("shift" if harmless else "full", spikes, self._step, None, reason) if spikes else None

    def update(self, step: int, values: StepValues) -> list[Event]:
        """Takes the signals of a step; returns the events whose verdict is reached. Empty after a full divergence."""
        if self.ledger.full_divergence is not None:
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
        self.open.update_cut(values.worst_cut)
        full = self._check_full_divergence() or self._check_step_cut()
        return [full] if full else self._check_spike() + self._check_probation()

    def finish(self, eval_aucs: Sequence[float], eval_nes: Sequence[float] = ()) -> list[Event]:
        """Reaches a verdict on whatever is open at the end of training.

        Args:
            eval_aucs: AUC per task on the hold-out; nan for regressions, and where it is unknown.
            eval_nes: normalised entropy per task, likewise.
        """
        if self.ledger.full_divergence is not None or not self._step_count:
            return []
        s = self._settings
        long_enough = self._step_count >= 2 * s.startup
        if long_enough and (entropy := entropy_of_useless_model(eval_aucs, eval_nes, s)):
            self.open.spike = self.open.spike or self.open.blowup
            return [
                self._diverge(f"AUC on the hold-out is at 0.5, log loss {entropy:.3g}x that of the base rate", None)
            ]
        if (judged := self._judge_by_holdout(eval_aucs)) is not None:
            return judged
        held_out = auc_above_chance(self.tasks, eval_aucs, s)
        first = self.open.first
        had_learned = first is not None and not first.startup and self.open.skill_was_known
        if not had_learned and held_out >= 1.5 * s.auc_tolerance and not self._constant.length:
            # A model that ranks the hold-out well is not lost, whatever was open when training ended.
            return self._end_spike()
        if self._nonfinite.length:
            return [self._diverge(_NOT_FINITE, self._nonfinite.since)]
        if self._constant.length >= s.settle and (self._was_varied or self.open.blowup):
            return [self._diverge(_CONSTANT, self._constant.since)]
        spike = self.open.spike
        if spike is not None and not spike.calm_steps and self._step - spike.step >= s.settle:
            return [self._diverge(not_recovered(spike, self._step), spike.step)]
        if self._auc.learned and self._auc.at_chance.length >= s.settle:
            return [self._diverge_auc_lost()]
        if self.open.blowup and not self._auc.learned and long_enough:
            training = math.isnan(held_out)
            known = auc_above_chance(self.tasks, [t.auc for t in self.tasks], s) if training else held_out
            if known < s.auc_tolerance:
                return [self._diverge_nothing_learned("training AUC" if training else "AUC on the hold-out")]
        return self._leave_unsettled()

    def _judge_by_holdout(self, eval_aucs: Sequence[float]) -> list[Event] | None:
        """The verdict on open or unsettled spikes where the hold-out shows it; otherwise None.

        The rows of the hold-out are others than those before the spike, and may be harder to rank. Learning is gone
        where less than half is left, and it is back by the tolerance that holds during training.
        """
        spike = self.open.first
        if spike is None or spike.startup or not self.open.skill_was_known:
            return None
        compared = [
            (task, before, Skill(auc=auc, pairs=before.pairs))
            for task, before, auc in zip(self.tasks, self.open.skill_before, eval_aucs, strict=True)
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
        spike, self.open.spike = self.open.spike, None
        pending = self.open.probation.spikes if self.open.probation else []
        self.open.probation = None
        if spike is not None and spike.calm_steps and not any(x.is_known for x in self.open.before):
            self.open.spike = spike  # the loss is all that is known, and it came back
            return self._end_spike()
        if spike is not None and not self.open.is_harmless(spike):
            pending = [*pending, spike]
        return [self.ledger.unsettled(x, self._step) for x in pending]

    def _update_spike(self, step: int, nonfinite: bool) -> None:
        """Opens a spike or updates the open one; without a spike, updates the baselines."""
        if self.open.spike is None:
            startup = self._step_count <= self._settings.startup
            found = detect_spike(step, self.tasks, self._settings, nonfinite=nonfinite, startup=startup)
            if found is not None:
                self.open.begin(found, self.tasks)
        if self.open.spike is not None:
            constant = self._constant.length > 0 and self._was_varied
            self.open.update(step, self.tasks, nonfinite=nonfinite, constant=constant)
            return
        for task in self.tasks:
            task.update_baseline()

    def _check_full_divergence(self) -> Event | None:
        s, steps_at_chance = self._settings, self._auc.at_chance.length
        if self._nonfinite.length >= s.nonfinite_patience:
            return self._diverge(_NOT_FINITE, self._nonfinite.since)
        if self._constant.length >= (s.dead_patience if self._was_varied else s.unborn_patience):
            return self._diverge(_CONSTANT, self._constant.since)
        if self._auc.learned and steps_at_chance >= s.auc_patience:
            return self._diverge_auc_lost()
        if self.open.blowup and not self._auc.learned and steps_at_chance >= s.auc_patience:
            return self._diverge_nothing_learned("training AUC")
        return None

    def _check_step_cut(self) -> Event | None:
        """The fast verdict: a spike has cut the step size of a layer, and the AUC of a task is lost.

        Adagrad's step size does not come back. So what was lost is not learned again soon, and there is no reason to
        wait. A cut alone is not enough: a spike that makes all steps small may leave the weights as good as they were.
        """
        s, spike = self._settings, self.open.first
        if spike is None or spike.startup or not self.open.cut >= s.lost_step_cut:
            return None
        if self._step - spike.step + 1 < s.fast_steps:
            return None
        first = max(spike.step, self._step - 2 * s.fast_steps + 1)
        for task, before in zip(self.tasks, self.open.skill_before, strict=True):
            now = task.skill.between(first, self._step)
            if now.lost_auc(before, s, errors=_CERTAIN_AT_ONCE):
                cut = f"the step size of the median coordinate of a layer was cut {self.open.cut:.3g} times"
                fell = f"the AUC of {task.name} fell from {before.auc:.3f} to {now.auc:.3f}"
                return self._diverge(f"{spike}; {cut} and {fell} within {self._step - spike.step + 1} steps", None)
        return None

    def _check_probation(self) -> list[Event]:
        """Settles the spikes that are over: micro as soon as the skill is back, full if it is not in time."""
        s, probation = self._settings, self.open.probation
        if probation is None or self.open.spike is not None or self._step - probation.since + 1 < s.proof_steps:
            return []
        lost = what_was_lost(self._step, self.tasks, probation.before, s)
        if not lost:
            # A model that had learned nothing loses nothing, but after a blow-up it may never learn.
            blown_up = self.open.blowup is not None and self.open.blowup.step == probation.spikes[0].step
            if blown_up and not self._auc.learned and self._auc.at_chance.length and self._step < probation.deadline:
                return []
            return self._settle()
        if self._step < probation.deadline:
            return []
        return [self._diverge(self._but(f"{lost} after {self._step - probation.since + 1} steps"), None)]

    def _but(self, what: str) -> str:
        """What came back and what did not, of the open or unsettled spikes."""
        spike = self.open.probation.spikes[-1] if self.open.probation else self.open.spike
        assert spike is not None
        return f"{came_back(spike)}, {what}"

    def _check_spike(self) -> list[Event]:
        """Ends the open spike where it has recovered or has lasted too long."""
        spike, s = self.open.spike, self._settings
        if spike is None:
            return []
        if spike.has_recovered(self.tasks, s):
            return self._end_spike()
        if self._step - spike.step < s.patience:
            return []
        high = not_recovered(spike, self._step)
        if losses_are_lost(self.tasks, s) or spike.depth >= s.blowup_ratio:
            return [self._diverge(high, spike.step)]
        lost = what_was_lost(self._step, self.tasks, self.open.before, s)
        if lost or (lost := worse_than_constant(self._step, self.tasks, s)):
            return [self._diverge(f"{high}; {lost}", spike.step)]
        for task in self.tasks:
            if max(task.excess, task.median_excess) > 0.5:
                task.baseline.restart(list(task.recent))
        self.open.spike = None
        text = f"{spike} and has stayed for {self._step - spike.step} steps; taken for a new level of the data"
        return [event("shift", [spike], self._step, None, text)]

    def _end_spike(self, *, proven: bool = False) -> list[Event]:
        """Ends the open spike: micro where nothing but the loss is known or all is ``proven``, otherwise probation."""
        spike, self.open.spike = self.open.spike, None
        if spike is None:
            return []
        self.open.last = spike
        if spike.startup or (spike.calm_steps and not spike.is_event(self._settings)):
            return []
        s, known = self._settings, any(skill.is_known for skill in self.open.before)
        if self.open.probation is not None:
            self.open.probation.spikes.append(spike)
            self.open.probation.since = max(spike.calm_since, self.open.probation.since)
            return []
        if known and not proven:
            since = spike.calm_since
            self.open.probation = Probation([spike], self.open.before, since, since + s.recovery_steps - 1)
            return []
        return [self.ledger.micro(spike, self._step)]

    def _settle(self) -> list[Event]:
        """All spikes of the probation were micro divergences."""
        probation, self.open.probation = self.open.probation, None
        return [self.ledger.micro(spike, self._step) for spike in probation.spikes] if probation else []

    def _diverge_auc_lost(self) -> Event:
        since, last = self._auc.at_chance.since, self.open.last
        if last is not None and 0 <= since - last.calm_since <= self._settings.auc_patience:
            self.open.spike = self.open.spike or last  # the AUC is an average over past steps, so it falls later
        return self._diverge(f"training AUC is back at 0.5, down from {0.5 + self._auc.best:.3f} on average,", since)

    def _diverge_nothing_learned(self, what: str) -> Event:
        self.open.spike, self.open.probation = self.open.blowup, None
        reason = f"{what} is at 0.5 after {self._step_count} steps, no task was learned"
        return self._diverge(reason, None, later=self.open.since_blowup()[1:])

    def _diverge(self, reason: str, since: int | None, *, later: Sequence[LossSpike] = ()) -> Event:
        """Records the full divergence. It began with the first spike that is open or unsettled, or at ``since``.

        Args:
            reason: why the model is lost, in words.
            since: step since when that holds.
            later: spikes that have ended and belong to the same divergence.
        """
        spikes = self.open.every
        first = spikes[0] if spikes else LossSpike(step=since or 1, task="", depth=1.0, startup=False)
        if since is not None and since != first.step:
            reason = f"{reason} since step {since}"
        named = self.open.probation.spikes if self.open.probation else [first]
        if spikes and not any(reason.startswith(str(x)) for x in named):
            reason = f"{first}; {reason}"
        self.open.probation = None
        return self.ledger.full([*(spikes or [first]), *later], self._step, reason)

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings, tensors, lists and dicts."""
        return {
            "tasks": {task.name: task.state_dict() for task in self.tasks},
            **self.open.state_dict(),
            **self.ledger.state_dict(),
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
        self.open.load_state_dict(state)
        self.ledger.load_state_dict(state)
        self._step_count, self._step, self._was_varied = state["step_count"], state["step"], state["was_varied"]
        self._auc.load_state_dict(state["auc"])
        self._constant, self._nonfinite = Streak(**state["constant"]), Streak(**state["nonfinite"])
