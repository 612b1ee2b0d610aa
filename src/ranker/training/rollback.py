"""Rollback: after a divergence, restores an earlier snapshot and leaves out the batches that caused it."""

from __future__ import annotations

from typing import Any, Literal

from torch.optim import Optimizer

from ranker.capsules.training_state import TrainingState
from ranker.errors import UserError, one_of
from ranker.runs import metric_names
from ranker.runs.run_folder import RunFolder
from ranker.stability import DivergenceDetector, Event
from ranker.training.module import Fit
from ranker.training.progress import Say
from ranker.training.snapshots import SnapshotRing, restore

Cause = Literal["full", "micro"]


class Rollback:
    """Restores the newest healthy snapshot at least ``back_steps`` before an event, and leaves out batches from there.

    Steps keep counting up: a rollback at step 900 to step 800 continues with 901. So a step is one row of metrics.csv,
    one point of a tracker, one name of a checkpoint, and the rows of the lost steps stay visible. The detector's state
    is rolled back with the model's, so its verdict is withdrawn; the event stays in events.jsonl, followed by an event
    of kind ``rollback``.

    The verdict comes up to the detector's patience after the first bad step; all steps since the snapshot are undone.
    Every rank sees the same signals and holds snapshots of the same steps, so all ranks do the same without
    communication. A divergence that only the hold-out shows, at the end of training, comes too late.

    Args:
        tries: number of rollbacks a run may make; then it stops as diverged. 0 makes none.
        cause: ``full`` for full divergences only, ``micro`` also for micro divergences, once they are over.
        back_steps: smallest distance in steps from the snapshot to the first step of the event. If there is no such
            snapshot, the oldest one before the event is taken.
        skip_batches: number of batches to leave out, from about ``back_steps`` before the event on; 0 trains on them
            again.
        lr_factor: multiplies the learning rate at each rollback.
        folder: the run folder; without one nothing is written.

    Attributes:
        tries: as given.
        done: records of the rollbacks so far, in order; see ``_record``.

    Raises:
        UserError: a value out of range.

    Source: Chowdhery et al., "PaLM" (2022), section 5.1: restart about 100 steps before a spike and skip 200 to 500
    batches. Zhang et al., "OPT" (2022), section 2.5: restart with a lower learning rate.
    """

    def __init__(
        self,
        *,
        tries: int = 0,
        cause: Cause = "full",
        back_steps: int = 100,
        skip_batches: int = 300,
        lr_factor: float = 1.0,
        folder: RunFolder | None = None,
    ) -> None:
        one_of(cause, ("full", "micro"), "callbacks.rollback.cause")
        for name, value in (("tries", tries), ("back_steps", back_steps), ("skip_batches", skip_batches)):
            if value < 0:
                raise UserError(f"callbacks.rollback.{name} must be 0 or more, got {value}")
        if not 0 < lr_factor <= 1:
            raise UserError(f"callbacks.rollback.lr_factor must be above 0 and at most 1, got {lr_factor}")
        self.tries, self._cause = tries, cause
        self._back_steps, self._skip_batches, self._lr_factor = back_steps, skip_batches, lr_factor
        self._folder = folder
        self.done: list[dict[str, Any]] = []

    def start(self, fit: Fit) -> None:
        """Writes the file of skipped rows as the checkpoint knows it, if the run resumes."""
        if self.done:
            self._list_rows(fit)

    def roll_back(
        self, fit: Fit, events: list[Event], *, ring: SnapshotRing, detector: DivergenceDetector, say: Say
    ) -> bool:
        """Rolls back because of one of the events; False if none asks for it, or if it is not possible.

        Every rank calls it at the same step with the same events.
        """
        cause = next((e for e in events if e.kind == "full" or e.kind == self._cause), None)
        if cause is None or not self.tries:
            return False
        if len(self.done) >= self.tries:
            say(line := f"no rollback: {self.tries} of {self.tries} made", note=line)
            return False
        snapshot = self._choose(cause, ring)
        if snapshot is None:
            say(line := f"no rollback: no healthy snapshot of a step before {cause.step}", note=line)
            return False
        skipped = self._first_batch(snapshot, cause, fit) - snapshot.position
        before = fit.step
        restore(snapshot, fit, detector, skip_batches=skipped)
        since = sum(r["step"] > snapshot.step for r in self.done)  # their lr_factor is not in the snapshot
        _scale_lr(fit, self._lr_factor ** (since + 1))
        ring.forget_after(snapshot.step, now=before)
        record = self._record(fit, cause, snapshot)
        text = f"rollback {record['try']} of {self.tries}: from step {record['step']} to {snapshot.step}"
        say(f"{text}, batches {snapshot.position} to {fit.data.position - 1} left out", note=text)
        return True

    def kept(self, step: int) -> int:
        """How many of the steps up to a kept step were kept."""
        return step - sum(r["step"] - r["to_step"] for r in self.done if r["step"] <= step)

    def _choose(self, cause: Event, ring: SnapshotRing) -> TrainingState | None:
        before = [s for s in ring.snapshots if s.healthy and s.step < cause.step]
        far = [s for s in before if self.kept(s.step) <= self.kept(cause.step) - self._back_steps]
        return far[-1] if far else next(iter(before), None)

    def _first_batch(self, snapshot: TrainingState, cause: Event, fit: Fit) -> int:
        """The batch to continue with, after the first batch of the event, also if batches were skipped before."""
        if not self._skip_batches:
            return snapshot.position
        batches_per_step = fit.trainer.accumulate_grad_batches
        last = next((r for r in reversed(self.done) if r["step"] < cause.step), {"batch": 0, "step": 0})
        event = last["batch"] + (cause.step - last["step"] - 1) * batches_per_step
        start = max(snapshot.position, event - self._back_steps * batches_per_step)
        return min(start + self._skip_batches, fit.data.num_batches)

    def _record(self, fit: Fit, cause: Event, snapshot: TrainingState) -> dict[str, Any]:
        """Writes the rollback to events.jsonl and the trackers, and the rows that were left out to a file."""
        data = fit.data
        ranges = data.row_ranges(snapshot.position, data.position)
        record = {
            "kind": "rollback",
            "step": fit.step,  # the last undone step; the next step has the number after it
            "to_step": snapshot.step,
            "try": len(self.done) + 1,
            "cause": cause.kind,
            "event_step": cause.step,
            "batch": data.position,  # the next one
            "skipped_batches": [snapshot.position, data.position],  # the first, and the one after the last
            "skipped_row_span": [int(ranges[0, 0]), int(ranges[-1, 1])] if len(ranges) else None,
            "skipped_rows": int((ranges[:, 1] - ranges[:, 0]).sum()),
            "lr": float(fit.trainer.optimizers[0].param_groups[0]["lr"]),
            "reason": cause.reason,
        }
        self.done = [*self.done, record]
        if self._folder is not None and fit.trainer.is_global_zero:
            self._folder.append_event(record)
        self._list_rows(fit)
        fit.module.record({metric_names.divergence("rollback"): float(snapshot.step)})
        return record

    def _list_rows(self, fit: Fit) -> None:
        if self._folder is not None and fit.trainer.is_global_zero:
            self._folder.save_skipped_rows([(r["try"], fit.data.row_ranges(*r["skipped_batches"])) for r in self.done])


def _scale_lr(fit: Fit, factor: float) -> None:
    optimizer: Optimizer = fit.trainer.optimizers[0]
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = group[name] * factor
    for config in fit.trainer.lr_scheduler_configs:
        config.scheduler.base_lrs = [lr * factor for lr in config.scheduler.base_lrs]
