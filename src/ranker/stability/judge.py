"""The verdict, step by step: a state machine over the signals of all tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ranker.stability.events import Event, Kind, Status
from ranker.stability.settings import DetectorSettings
from ranker.stability.task import TaskTrack


@dataclass
class Jump:
    """A jump that is not over.

    Attributes:
        step: first step.
        task: index of the task that moved first; -1 where only predictions were not finite.
        depth: highest loss over baseline so far.
        startup: opened among the first steps.
        calm: steps in a row below the threshold.
        calm_since: first of them.
    """

    step: int
    task: int
    depth: float
    startup: bool
    calm: int = 0
    calm_since: int = 0


@dataclass
class Streak:
    """Steps in a row that something has been so."""

    length: int = 0
    since: int = 0

    def count(self, step: int, holds: bool) -> int:
        """Adds a step."""
        if holds and not self.length:
            self.since = step
        self.length = self.length + 1 if holds else 0
        return self.length


class Judge:
    """Tells healthy, micro and full apart. Works on plain numbers, one step after the other.

    Args:
        task_names: names of the tasks, in the order of the signals.
        settings: thresholds and patience.
    """

    def __init__(self, task_names: Sequence[str], settings: DetectorSettings) -> None:
        self._settings = settings
        self.tasks = [TaskTrack(name, settings) for name in task_names]
        self.jump: Jump | None = None
        self.lost: Event | None = None
        self.micro = 0
        self.first_step: int | None = None
        self.steps = 0
        self.step = 0
        self._alive = False
        self._start: Jump | None = None  # the startup jump, kept: it says when a model that never learned blew up
        self._nonfinite, self._flat, self._collapsed = Streak(), Streak(), Streak()

    @property
    def status(self) -> Status:
        """``diverged`` once lost; ``suspect`` while something is open."""
        if self.lost is not None:
            return "diverged"
        return "suspect" if self.jump or self._flat.length or self._collapsed.length else "healthy"

    @property
    def reason(self) -> str:
        """Why the status is not healthy; empty where it is."""
        if self.lost is not None:
            return self.lost.reason
        if self.jump is not None:
            return f"{self._jumped(self.jump)} and has not come back for {self.step - self.jump.step} steps"
        if self._flat.length:
            return f"predictions have not depended on the input since step {self._flat.since}"
        return f"training AUC is back at 0.5 since step {self._collapsed.since}" if self._collapsed.length else ""

    def see(
        self, step: int, losses: Sequence[float], aucs: Sequence[float], spreads: Sequence[float], nonfinite: bool
    ) -> list[Event]:
        """Takes a step's signals; returns what they settle. After a full divergence nothing is settled any more."""
        if self.lost is not None:
            return []
        self.step, self.steps = step, self.steps + 1
        for task, loss, auc in zip(self.tasks, losses, aucs, strict=True):
            task.see(step, loss, auc)
        broken = nonfinite or not all(map(math.isfinite, losses))
        known = [x for x in spreads if not math.isnan(x)]
        self._alive |= max(known, default=0.0) > 10 * self._settings.dead_spread
        flat = self._flat.count(step, bool(known) and max(known) < self._settings.dead_spread)
        self._watch_jump(step, losses, broken)
        for task, loss in zip(self.tasks, losses, strict=True):
            if self.jump is None:
                task.learn_level(loss)
            if self.steps > self._settings.startup:
                task.learn_auc()
        collapsed = self._collapsed.count(step, self._all_collapsed())

        s = self._settings
        if self._nonfinite.count(step, broken) >= s.nonfinite_patience:
            return [self._lose("losses or predictions are not finite", self._nonfinite.since)]
        if flat >= (s.dead_patience if self._alive else s.unborn_patience):
            return [self._lose_flat()]
        if collapsed >= s.auc_patience:
            return [self._lose_collapsed()]
        return self._settle(step, flat > 0 or broken)

    def finish(self, eval_aucs: Sequence[float]) -> list[Event]:
        """Judges what is still open at the end of training.

        Args:
            eval_aucs: AUC of each task on the hold-out; nan for regressions, and where it is not known.
        """
        if self.lost is not None or not self.steps:
            return []
        s = self._settings
        few = s.settle
        sound = any(auc > 0.5 + 1.5 * task.tolerance for task, auc in zip(self.tasks, eval_aucs, strict=True))
        judged = [(t, auc) for t, auc in zip(self.tasks, eval_aucs, strict=True) if not math.isnan(auc)]
        if self._nonfinite.length and not sound:
            return [self._lose("losses or predictions are not finite", self._nonfinite.since)]
        if self._flat.length >= few and (self._alive or self.steps >= s.learn_patience):
            return [self._lose_flat()]
        if self._collapsed.length >= few and not sound:
            return [self._lose_collapsed()]
        if self.jump and not self.jump.calm and not sound:
            return [self._lose_high()]
        aucs = judged or [(t, t.auc) for t in self.tasks if not math.isnan(t.auc)]
        never = not any(t.learned for t in self.tasks) and all(t.says_nothing(auc) for t, auc in aucs)
        if aucs and never and self.steps >= s.learn_patience:
            return [self._lose_unlearned(bool(judged))]
        if self.jump:
            recovered = self.jump.calm_since if self.jump.calm else None
            return [self._close(self.jump, recovered)] if not self.jump.startup else []
        return []

    def _watch_jump(self, step: int, losses: Sequence[float], broken: bool) -> None:
        if self.jump is None:
            high = [i for i, task in enumerate(self.tasks) if task.excess > 1.0]
            if not high and not broken:
                return
            moved = [(t.moved_since, -t.excess, i) for i, t in enumerate(self.tasks) if t.moved_since is not None]
            since, _, first = min(moved, default=(step, 0.0, -1))
            assert since is not None
            self.jump = Jump(step=since, task=first, depth=1.0, startup=self.steps <= self._settings.startup)
            if self.jump.startup and self._start is None:
                self._start = self.jump
        if broken:
            self.jump.depth = math.inf
        for task, loss in zip(self.tasks, losses, strict=True):
            if task.excess > 1.0 and math.isfinite(loss) and task.baseline.level > 0:
                self.jump.depth = max(self.jump.depth, loss / task.baseline.level)

    def _settle(self, step: int, sick: bool) -> list[Event]:
        jump, s = self.jump, self._settings
        if jump is None:
            return []
        if sick or any(task.excess > 0.75 for task in self.tasks):
            jump.calm = 0
        else:
            jump.calm_since = jump.calm_since if jump.calm else step
            jump.calm += 1
        if jump.calm >= s.settle:
            self.jump = None
            return [] if jump.startup else [self._close(jump, jump.calm_since)]
        if step - jump.step < s.patience:
            return []
        if self._far_above():
            return [self._lose_high()]
        return [self._shift(jump)]

    def _far_above(self) -> bool:
        """Whether the losses of a jump that did not end are those of a lost model."""
        s = self._settings
        ratios = [task.ratio for task in self.tasks if task.excess > 0.75]
        if any(r >= s.lost_ratio_alone for r in ratios):
            return True
        return sum(r >= s.lost_ratio for r in ratios) * 2 > len(self.tasks)

    def _all_collapsed(self) -> bool:
        learned = [task for task in self.tasks if task.learned]
        return bool(learned) and all(task.says_nothing(task.auc) for task in learned)

    def _name(self, task: int) -> str:
        return self.tasks[task].name if task >= 0 else ""

    def _close(self, jump: Jump, recovered: int | None) -> Event:
        self.micro += 1
        length = (self.step if recovered is None else recovered) - jump.step
        back = f"came back after {length} steps" if recovered is not None else "had not quite come back at the end"
        return self._event("micro", jump, length, recovered, f"{self._jumped(jump)} and {back}")

    def _shift(self, jump: Jump) -> Event:
        for task in self.tasks:
            if task.excess > 0.5:
                task.baseline.restart(list(task.recent))
        self.jump = None
        length = self.step - jump.step
        text = f"{self._jumped(jump)} and has stayed there for {length} steps; taken for a new level of the data"
        return self._event("shift", jump, length, None, text)

    def _event(self, kind: Kind, jump: Jump, length: int, recovered: int | None, reason: str) -> Event:
        if kind != "shift" and self.first_step is None:
            self.first_step = jump.step
        return Event(
            kind=kind,
            step=jump.step,
            task=self._name(jump.task),
            depth=jump.depth,
            length=length,
            recovered_at=recovered,
            judged_at=self.step,
            reason=reason,
        )

    def _lose_high(self) -> Event:
        assert self.jump is not None
        since = self.step - self.jump.step
        return self._lose(f"{self._jumped(self.jump)} and has not come back for {since} steps", self.jump.step)

    def _lose_flat(self) -> Event:
        return self._lose(
            "predictions no longer depend on the input (the same logit for every row, in every task)", self._flat.since
        )

    def _lose_collapsed(self) -> Event:
        names = ", ".join(f"{t.name} from {t.best_auc:.3f}" for t in self.tasks if t.learned)
        return self._lose(f"training AUC fell back to 0.5 ({names})", self._collapsed.since)

    def _lose_unlearned(self, held_out: bool) -> Event:
        where = "on the hold-out " if held_out else "in training "
        start = self._start
        return self._lose(
            f"no task was learned: AUC {where}within {self._settings.auc_tolerance:g} of 0.5 after {self.steps} steps",
            start.step if start else self.step - self.steps + 1,
        )

    def _lose(self, what: str, step: int) -> Event:
        """The full divergence: it began with the jump that was open, or at the given step."""
        jump = self.jump or Jump(step=step, task=-1, depth=1.0, startup=False)
        if jump.step < step or "at step" not in what:
            what = f"{what} since step {step}"
        if self.jump and "jumped" not in what:
            what = f"{what}; {self._jumped(jump)}"
        self.lost = self._event("full", jump, self.step - jump.step, None, what)
        return self.lost

    def _jumped(self, jump: Jump) -> str:
        who = f"the loss of {self._name(jump.task)}" if jump.task >= 0 else "a prediction"
        how = f"jumped to {jump.depth:.3g}x its past" if math.isfinite(jump.depth) else "became not finite"
        return f"{who} {how} at step {jump.step}"

    def state(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        streaks = {name: asdict(getattr(self, f"_{name}")) for name in ("nonfinite", "flat", "collapsed")}
        return {
            "tasks": {task.name: task.state() for task in self.tasks},
            "jump": asdict(self.jump) if self.jump else None,
            "start": asdict(self._start) if self._start else None,
            "lost": asdict(self.lost) if self.lost else None,
            "counts": [self.micro, self.steps, self.step],
            "first_step": self.first_step,
            "alive": self._alive,
            **streaks,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from ``state()``.

        Raises:
            KeyError: a task of this run is not in the state.
        """
        for task in self.tasks:
            task.load(state["tasks"][task.name])
        self.jump = Jump(**state["jump"]) if state["jump"] else None
        self._start = Jump(**state["start"]) if state["start"] else None
        self.lost = Event(**state["lost"]) if state["lost"] else None
        self.micro, self.steps, self.step = state["counts"]
        self.first_step, self._alive = state["first_step"], state["alive"]
        for name in ("nonfinite", "flat", "collapsed"):
            setattr(self, f"_{name}", Streak(**state[name]))
