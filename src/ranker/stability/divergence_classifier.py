"""The verdict, step by step: a state machine over the signals of all tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ranker.stability.auc_tracker import SkillWatch, Streak, skill
from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.event import Event, Kind, Status
from ranker.stability.loss_spike import Jump, far_above, open_jump
from ranker.stability.task_state import TaskTrack

_NOT_FINITE = "losses or predictions are infinite or nan"
_FLAT = "predictions no longer depend on the input (each task gives every row the same)"


class Judge:
    """Tells healthy, micro and full apart. Works on plain numbers, one step after the other.

    Args:
        task_names: names of the tasks, in the order of the signals.
        settings: thresholds and patience.

    Attributes:
        tasks: what is known of each task.
        jump: the open jump.
        lost: the full divergence; nothing changes after it.
        micro: jumps that came back.
        first_step: first step of the earliest divergence.
        steps: steps seen.
    """

    def __init__(self, task_names: Sequence[str], settings: DetectorSettings) -> None:
        self._settings = settings
        self.tasks = [TaskTrack(name, settings) for name in task_names]
        self.jump: Jump | None = None
        self.lost: Event | None = None
        self.micro = 0
        self.first_step: int | None = None
        self.steps = 0
        self._step = 0
        self._alive = False  # predictions once depended on the input
        self._blowup: Jump | None = None  # the first jump that blew up: where a model that never learned was lost
        self._last: Jump | None = None  # the last jump that ended
        self._skill = SkillWatch(settings)
        self._nonfinite, self._flat = Streak(), Streak()

    @property
    def status(self) -> Status:
        """``diverged`` once lost; ``suspect`` while something is open."""
        if self.lost is not None:
            return "diverged"
        return "suspect" if self.reason else "healthy"

    @property
    def reason(self) -> str:
        """Why the status is not healthy; empty where it is."""
        if self.lost is not None:
            return self.lost.reason
        if self.jump is not None:
            return self._still(self.jump)
        if self._flat.length and self._alive:
            return f"{_FLAT} since step {self._flat.since}"
        if self._skill.learned and self._skill.without.length:
            return f"training AUC is back at 0.5 since step {self._skill.without.since}"
        return ""

    @property
    def suspicion(self) -> Event | None:
        """What it would be if what is open now never ended; None where nothing is.

        Of kind ``shift``, which is no divergence, for a jump among the first steps that did not blow up.
        """
        if self.lost is not None:
            return self.lost
        jump, reason = self.jump, self.reason
        wild = jump is not None and jump.startup and jump.over_first < self._settings.blowup_ratio
        if (wild or not reason) and self._blowup is not None and not self._skill.learned:
            jump, wild, reason = self._blowup, False, f"{self._blowup} and nothing has been learned since"
        elif jump is None and reason:
            flat = self._flat.length and self._alive
            jump = Jump(step=(self._flat if flat else self._skill.without).since, task="", depth=1.0, startup=False)
        if jump is None:
            return None
        return Event(
            kind="shift" if wild else "full",
            step=jump.step,
            task=jump.task,
            depth=jump.depth,
            length=self._step - jump.step,
            recovered_at=None,
            judged_at=self._step,
            reason=reason,
        )

    def see(
        self, step: int, losses: Sequence[float], aucs: Sequence[float], spreads: Sequence[float], nonfinite: bool
    ) -> list[Event]:
        """Takes a step's signals; returns what they settle. After a full divergence nothing is settled any more.

        Args:
            step: number of the step.
            losses: of each task; 0 where no label was observed.
            aucs: training AUC of each task; nan where there is none.
            spreads: standard deviation of each task's logits; nan where it is not known.
            nonfinite: a prediction was not finite.
        """
        if self.lost is not None:
            return []
        s = self._settings
        self._step, self.steps = step, self.steps + 1
        for task, loss, auc in zip(self.tasks, losses, aucs, strict=True):
            task.see(step, loss, auc)
        broken = nonfinite or not all(map(math.isfinite, losses))
        widest = max((x for x in spreads if not math.isnan(x)), default=math.nan)
        self._alive |= widest > 10.0 * s.dead_spread
        self._nonfinite.count(step, broken)
        self._flat.count(step, widest < s.dead_spread)
        if self.steps > s.startup:
            self._skill.see(step, skill(self.tasks, aucs, s))
        self._follow(step, losses, broken)
        lost = self._lost()
        return [lost] if lost else self._settle()

    def finish(self, eval_aucs: Sequence[float], eval_nes: Sequence[float] = ()) -> list[Event]:
        """Judges what is still open at the end of training.

        Args:
            eval_aucs: AUC of each task on the hold-out; nan for regressions, and where it is not known.
            eval_nes: normalised entropy likewise.
        """
        if self.lost is not None or not self.steps:
            return []
        s = self._settings
        if self.steps >= 2 * s.startup and (worse := _useless(eval_aucs, eval_nes, s)):
            self.jump = self.jump or self._blowup
            return [self._lose(f"AUC on the hold-out is at 0.5, log loss {worse:.3g}x that of the base rate", None)]
        held_out = skill(self.tasks, eval_aucs, s)
        if held_out >= 1.5 * s.auc_tolerance and not self._flat.length:
            # A model that ranks the hold-out is not lost, whatever was going on when training ended.
            return self._end_of_jump()
        if self._nonfinite.length:
            return [self._lose(_NOT_FINITE, self._nonfinite.since)]
        if self._flat.length >= s.settle and (self._alive or self._blowup):
            return [self._lose(_FLAT, self._flat.since)]
        if self.jump is not None and not self.jump.calm:
            return [self._lose(self._still(self.jump), self.jump.step)]
        if self._skill.learned and self._skill.without.length >= s.settle:
            return [self._lose_skill()]
        if self._blowup and not self._skill.learned and self.steps >= 2 * s.startup:
            known = held_out if not math.isnan(held_out) else skill(self.tasks, [t.auc for t in self.tasks], s)
            if known < s.auc_tolerance:
                return [self._lose_unlearned("training AUC" if math.isnan(held_out) else "AUC on the hold-out")]
        return self._end_of_jump()

    def _follow(self, step: int, losses: Sequence[float], broken: bool) -> None:
        """Opens a jump or follows the open one; without any, the losses enter their baselines."""
        if self.jump is None:
            startup = self.steps <= self._settings.startup
            self.jump = open_jump(step, self.tasks, self._settings, broken=broken, startup=startup)
        if self.jump is not None:
            if self._blowup is None and self.jump.over_first >= self._settings.blowup_ratio:
                self._blowup = self.jump
            self.jump.follow(step, self.tasks, broken=broken, flat=self._flat.length > 0 and self._alive)
            return
        for task, loss in zip(self.tasks, losses, strict=True):
            task.learn(loss)

    def _lost(self) -> Event | None:
        s, unskilled = self._settings, self._skill.without.length
        if self._nonfinite.length >= s.nonfinite_patience:
            return self._lose(_NOT_FINITE, self._nonfinite.since)
        if self._flat.length >= (s.dead_patience if self._alive else s.unborn_patience):
            return self._lose(_FLAT, self._flat.since)
        if self._skill.learned and unskilled >= s.auc_patience:
            return self._lose_skill()
        if self._blowup and not self._skill.learned and unskilled >= s.auc_patience:
            return self._lose_unlearned("training AUC")
        return None

    def _settle(self) -> list[Event]:
        """Ends the open jump where it is over or has lasted too long."""
        jump, s = self.jump, self._settings
        if jump is None:
            return []
        if jump.over(self.tasks, s):
            return self._end_of_jump()
        if self._step - jump.step < s.patience:
            return []
        if far_above(self.tasks, s):
            return [self._lose(self._still(jump), jump.step)]
        for task in self.tasks:
            if max(task.excess, task.lasting) > 0.5:
                task.baseline.restart(list(task.recent))
        self.jump = None
        text = f"{jump} and has stayed for {self._step - jump.step} steps; taken for a new level of the data"
        return [self._event("shift", jump, None, text)]

    def _end_of_jump(self) -> list[Event]:
        jump, self.jump = self.jump, None
        if jump is None:
            return []
        self._last = jump
        if jump.startup:
            return []
        self.micro += 1
        if not jump.calm:
            return [self._event("micro", jump, None, f"{jump} and had not come back when training ended")]
        return [
            self._event("micro", jump, jump.calm_since, f"{jump} and came back in {jump.calm_since - jump.step} steps")
        ]

    def _lose_skill(self) -> Event:
        since = self._skill.without.since
        if self._last is not None and 0 <= since - self._last.calm_since <= self._settings.auc_patience:
            self.jump = self.jump or self._last  # the AUC is an average over the past: it falls some steps later
        return self._lose(f"training AUC is back at 0.5, down from {0.5 + self._skill.best:.3f} on average,", since)

    def _lose_unlearned(self, what: str) -> Event:
        self.jump = self._blowup
        return self._lose(f"{what} is at 0.5 after {self.steps} steps, no task was learned", None)

    def _lose(self, what: str, since: int | None) -> Event:
        """The full divergence. It began with the open jump, where there is one, or else at the given step."""
        jump = self.jump or Jump(step=since or 1, task="", depth=1.0, startup=False)
        if since is not None and since != jump.step:
            what = f"{what} since step {since}"
        if self.jump is not None and not what.startswith(str(jump)):
            what = f"{jump}; {what}"
        self.lost = self._event("full", jump, None, what)
        return self.lost

    def _event(self, kind: Kind, jump: Jump, recovered: int | None, reason: str) -> Event:
        if kind != "shift":
            self.first_step = jump.step if self.first_step is None else min(self.first_step, jump.step)
        return Event(
            kind=kind,
            step=jump.step,
            task=jump.task,
            depth=jump.depth,
            length=(self._step if recovered is None else recovered) - jump.step,
            recovered_at=recovered,
            judged_at=self._step,
            reason=reason,
        )

    def _still(self, jump: Jump) -> str:
        return f"{jump} and has not come back for {self._step - jump.step} steps"

    def state(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "tasks": {task.name: task.state() for task in self.tasks},
            "jumps": [asdict(j) if j else None for j in (self.jump, self._blowup, self._last)],
            "lost": asdict(self.lost) if self.lost else None,
            "micro": self.micro,
            "first_step": self.first_step,
            "steps": [self.steps, self._step],
            "alive": self._alive,
            "skill": self._skill.state(),
            "nonfinite": asdict(self._nonfinite),
            "flat": asdict(self._flat),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from ``state()`` of a judge of the same tasks."""
        for task in self.tasks:
            task.load(state["tasks"][task.name])
        self.jump, self._blowup, self._last = (Jump(**j) if j else None for j in state["jumps"])
        if self.jump is not None and self._blowup is not None and self.jump.step == self._blowup.step:
            self._blowup = self.jump  # one and the same while it is open
        self.lost = Event(**state["lost"]) if state["lost"] else None
        self.micro, self.first_step = state["micro"], state["first_step"]
        (self.steps, self._step), self._alive = state["steps"], state["alive"]
        self._skill.load(state["skill"])
        self._nonfinite, self._flat = Streak(**state["nonfinite"]), Streak(**state["flat"])


def _useless(aucs: Sequence[float], nes: Sequence[float], settings: DetectorSettings) -> float:
    """The median normalised entropy on the hold-out where it, and the AUCs, say that the model is lost; else 0.

    Medians, so that neither a rare task's noisy AUC nor one badly calibrated task decides.
    """
    aucs, nes = ([x for x in values if not math.isnan(x)] for values in (aucs, nes))
    if not aucs or not nes or statistics.median(aucs) >= 0.5 + 2.0 * settings.auc_tolerance:
        return 0.0
    worse = statistics.median(nes)
    return worse if worse >= settings.lost_ne else 0.0
