"""Rollback: when a model is lost, go back to before it was, leave out the batches that did it, go on."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ranker.data.datamodule import RankingDataModule
from ranker.errors import UserError, one_of
from ranker.runs.run_folder import RunFolder
from ranker.stability import Event
from ranker.training.divergence_watch import DivergenceWatch
from ranker.training.module import RankingModule
from ranker.training.progress import TrainingProgress
from ranker.training.snapshot_ring import SnapshotRing
from ranker.training.snapshots import Snapshot, restore

Cause = Literal["full", "micro"]


class Rollback(Callback):
    """Goes back to the newest healthy snapshot ``back_steps`` before an event began, and leaves out batches from there.

    Steps count up all the same: one that goes back from step 900 to 800 goes on with 901, so that a step is one row of
    metrics.csv, one point of a tracker, one name of a checkpoint, and the rows of the lost steps stay to be looked at.
    The detector's state is rolled back with the model's, so its verdict of being lost is taken back; the event stays in
    events.jsonl, followed by one of kind ``rollback``.

    The verdict comes some steps after the first bad one, up to the detector's patience; all of them are undone. Where a
    second event follows, its 100 steps are counted along the steps that were kept. Every rank sees the same signals and
    holds snapshots of the same steps, so all do the same without asking each other. What the hold-out alone shows, at
    the end of training, comes too late.

    Args:
        tries: rollbacks a run may make; then it stops as diverged. 0 makes none.
        cause: ``full`` divergences only, or ``micro`` ones too, once they are settled.
        back_steps: steps from the snapshot to the first step of the event, at least, where there is such a snapshot;
            else the oldest one before the event is taken.
        skip_batches: batches to leave out from about ``back_steps`` before the event on; 0 trains on them again.
        lr_factor: multiplies the learning rate at each rollback.

    Attributes:
        folder: the run folder; nothing is written without one.
        done: what was done so far, in order; see ``_record``.

    Raises:
        UserError: a value out of range; or, when training starts, no divergence watch or no snapshots.

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
    ) -> None:
        one_of(cause, ("full", "micro"), "callbacks.rollback.cause")
        for name, value in (("tries", tries), ("back_steps", back_steps), ("skip_batches", skip_batches)):
            if value < 0:
                raise UserError(f"callbacks.rollback.{name} must be 0 or more, got {value}")
        if not 0 < lr_factor <= 1:
            raise UserError(f"callbacks.rollback.lr_factor must be above 0 and at most 1, got {lr_factor}")
        self._tries, self._cause = tries, cause
        self._back_steps, self._skip_batches, self._lr_factor = back_steps, skip_batches, lr_factor
        self._ring: SnapshotRing | None = None
        self.folder: RunFolder | None = None
        self.done: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the snapshots, and asks the divergence watch to be called before it ends a run."""
        if stage != "fit" or not self._tries:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        watch = next((c for c in callbacks if isinstance(c, DivergenceWatch)), None)
        self._ring = next((c for c in callbacks if isinstance(c, SnapshotRing)), None)
        if watch is None or self._ring is None or not self._ring.every:
            raise UserError(
                "callbacks.rollback needs callbacks.divergence, and callbacks.snapshots with every above 0; "
                "or switch it off: callbacks.rollback.tries=0"
            )
        watch.rescue = self.rescue

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the file of skipped rows as the checkpoint knows it, where a run goes on."""
        if self.done:
            self._list_rows(trainer)

    def rescue(self, trainer: pl.Trainer, module: RankingModule, events: list[Event]) -> bool:
        """Rolls back because of one of the events, or returns False: none asks for it, or there is no way.

        Called on every rank at the same step with the same events.
        """
        cause = next((e for e in events if e.kind == "full" or e.kind == self._cause), None)
        if cause is None:
            return False
        if len(self.done) >= self._tries:
            _say(trainer, f"no rollback: {self._tries} of {self._tries} made")
            return False
        snapshot = self._choose(cause)
        if snapshot is None:
            _say(trainer, f"no rollback: no healthy snapshot of a step before {cause.step}")
            return False
        stop = self._first_batch(snapshot, cause, trainer)
        before = trainer.global_step
        restore(snapshot, trainer, module, skip_batches=stop - snapshot.position)
        since = sum(r["step"] > snapshot.step for r in self.done)  # their lr_factor is not in the snapshot
        _scale_lr(trainer, self._lr_factor ** (since + 1))
        assert self._ring is not None
        self._ring.forget_after(snapshot.step, now=before)
        self._record(trainer, module, cause, snapshot)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What was done."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.done = list(state_dict["done"])

    def kept(self, step: int) -> int:
        """How many of the steps up to one that was kept were kept."""
        return step - sum(r["step"] - r["to_step"] for r in self.done if r["step"] <= step)

    def _choose(self, cause: Event) -> Snapshot | None:
        assert self._ring is not None
        before = [s for s in self._ring.snapshots if s.healthy and s.step < cause.step]
        far = [s for s in before if self.kept(s.step) <= self.kept(cause.step) - self._back_steps]
        return far[-1] if far else next(iter(before), None)

    def _first_batch(self, snapshot: Snapshot, cause: Event, trainer: pl.Trainer) -> int:
        """The batch to go on with. It lies behind the event's first one, also where batches were skipped before."""
        if not self._skip_batches:
            return snapshot.position
        a_step = trainer.accumulate_grad_batches
        last = next((r for r in reversed(self.done) if r["step"] < cause.step), {"batch": 0, "step": 0})
        event = last["batch"] + (cause.step - last["step"] - 1) * a_step
        start = max(snapshot.position, event - self._back_steps * a_step)
        return min(start + self._skip_batches, _datamodule(trainer).num_batches)

    def _record(self, trainer: pl.Trainer, module: RankingModule, cause: Event, snapshot: Snapshot) -> None:
        """Writes it down: events.jsonl, the tracker, the bar, and which rows were left out."""
        data = _datamodule(trainer)
        ranges = data.row_ranges(snapshot.position, data.position)
        record = {
            "kind": "rollback",
            "step": trainer.global_step,  # the last of the steps undone; the next has the number after it
            "to_step": snapshot.step,
            "try": len(self.done) + 1,
            "cause": cause.kind,
            "event_step": cause.step,
            "batch": data.position,  # the next one
            "skipped_batches": [snapshot.position, data.position],  # the first, and the one after the last
            "skipped_row_span": [int(ranges[0, 0]), int(ranges[-1, 1])] if len(ranges) else None,
            "skipped_rows": int((ranges[:, 1] - ranges[:, 0]).sum()),
            "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "reason": cause.reason,
        }
        self.done = [*self.done, record]
        if self.folder is not None and trainer.is_global_zero:
            self.folder.append_event(record)
        self._list_rows(trainer)
        module.record({"divergence/rollback": float(snapshot.step)})
        text = f"rollback {record['try']} of {self._tries}: from step {record['step']} to {snapshot.step}"
        _say(trainer, f"{text}, batches {snapshot.position} to {data.position - 1} left out", note=text)

    def _list_rows(self, trainer: pl.Trainer) -> None:
        if self.folder is None or not trainer.is_global_zero:
            return
        data = _datamodule(trainer)
        self.folder.save_skipped_rows([(r["try"], data.row_ranges(*r["skipped_batches"])) for r in self.done])


def _scale_lr(trainer: pl.Trainer, factor: float) -> None:
    for group in trainer.optimizers[0].param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = group[name] * factor
    for config in trainer.lr_scheduler_configs:
        config.scheduler.base_lrs = [lr * factor for lr in config.scheduler.base_lrs]


def _say(trainer: pl.Trainer, line: str, note: str | None = None) -> None:
    bar = next((c for c in trainer.callbacks if isinstance(c, TrainingProgress)), None)  # type: ignore[attr-defined]
    if bar is not None and trainer.is_global_zero:
        bar.note = note or line
        bar.say(line)


def _datamodule(trainer: pl.Trainer) -> RankingDataModule:
    datamodule: RankingDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule
