"""Rollback: after a divergence, restores an earlier snapshot, or part of it, and changes what caused the divergence."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch.optim.lr_scheduler import LambdaLR

from ranker.capsules.training_state import TrainingState, copied
from ranker.errors import UserError, one_of
from ranker.runs import metric_names
from ranker.runs.run_folder import RunFolder
from ranker.stability import DivergenceDetector, Event
from ranker.training import trackers
from ranker.training.fit import Fit
from ranker.training.hyperparameters import scale_lr
from ranker.training.module import OptimizerFactory
from ranker.training.optimizer_transfer import initial_state, made_optimizer, state_by_name, take_over
from ranker.training.progress import Say
from ranker.training.snapshots import SnapshotRing, restore, restore_history

Cause = Literal["full", "micro"]
What = Literal["all", "accumulators", "nothing"]


class Rollback:
    """Acts on a divergence: what it restores from a snapshot, what it leaves out, and what changes from then on.

    The snapshot is the newest healthy one at least ``back_steps`` before the first step of the event, however late the
    verdict came. ``restore`` says what is taken from it:

        all             the whole state; the batches of the event are left out
        accumulators    the optimizer's state; weights stay, no batch is left out
        nothing         weights and optimizer state stay, no batch is left out

    With each, the learning rate may be lowered (``lr_factor``), for good or rising back over ``lr_steps`` steps, and
    another optimizer may take over (``optim``): the same weights, and the same accumulators where it keeps the same.

    Steps keep counting up: a rollback at step 900 to step 800 continues with 901. So a step is one row of metrics.csv,
    one point of a tracker, one name of a checkpoint, and the rows of the lost steps stay visible. The detector's state
    is always that of the snapshot, so its verdict is withdrawn; the event stays in events.jsonl, followed by an event
    of kind ``rollback``.

    Every rank sees the same signals and holds snapshots of the same steps, so all ranks do the same without
    communication. A divergence that only the hold-out shows, at the end of training, comes too late.

    A run that is lost again from the same snapshot, before it learned anything, is given up before ``tries`` are spent.

    Args:
        tries: number of rollbacks a run may make; then it stops as diverged. 0 makes none.
        cause: ``full`` for full divergences only, ``micro`` also for micro divergences, once they are over.
        restore: ``all``, ``accumulators`` or ``nothing``.
        back_steps: smallest distance in steps from the snapshot to the first step of the event. If there is no such
            snapshot, the oldest one before the event is taken.
        skip_batches: number of batches to leave out, from about ``back_steps`` before the event on; 0 trains on them
            again. It doubles with each rollback that goes back behind the one before it: the run was lost again before
            it was healthy for long enough to take a snapshot.
        lr_factor: multiplies the learning rate at each rollback.
        lr_steps: number of steps over which the learning rate rises back linearly; 0: the factor stays.
        optim: makes the optimizer that takes over, as ``RankingModule``'s; None keeps the run's.
        folder: the run folder; without one nothing is written.

    Attributes:
        tries: as given.
        optim: as given.
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
        restore: What = "all",
        back_steps: int = 20,
        skip_batches: int = 40,
        lr_factor: float = 1.0,
        lr_steps: int = 0,
        optim: OptimizerFactory | None = None,
        folder: RunFolder | None = None,
    ) -> None:
        one_of(cause, ("full", "micro"), "callbacks.rollback.cause")
        one_of(restore, ("all", "accumulators", "nothing"), "callbacks.rollback.restore")
        numbers = {"tries": tries, "back_steps": back_steps, "skip_batches": skip_batches, "lr_steps": lr_steps}
        for name, value in numbers.items():
            if value < 0:
                raise UserError(f"callbacks.rollback.{name} must be 0 or more, got {value}")
        if not 0 < lr_factor <= 1:
            raise UserError(f"callbacks.rollback.lr_factor must be above 0 and at most 1, got {lr_factor}")
        self.tries, self.optim = tries, optim
        self._cause, self._restore = cause, restore
        self._back_steps, self._skip_batches = back_steps, skip_batches
        self._lr_factor, self._lr_steps = lr_factor, lr_steps
        self._original: OptimizerFactory | None = None  # the run's own, known at the first switch
        self._folder = folder
        self.done: list[dict[str, Any]] = []

    def load(self, fit: Fit, done: list[dict[str, Any]]) -> None:
        """Takes over a checkpoint's records, before the optimizer is made: it must be the one of the checkpoint."""
        self.done = list(done)
        if self.done:
            self._use_optimizer(fit)

    def start(self, fit: Fit) -> None:
        """Writes the file of skipped rows as the checkpoint knows it, if the run resumes."""
        if self.done:
            self._list_rows(fit)

    def after_step(self, fit: Fit) -> None:
        """Raises the learning rate while it comes back from a rollback. Call it after each optimizer step, once."""
        if self.done and self._lr_steps:
            scale_lr(fit.trainer, self._rate(fit.step) / self._rate(fit.step - 1))

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
        if in_vain := self._in_vain(cause, snapshot):
            say(f"no rollback: {in_vain}", note="no rollback")
            return False
        before, rate = fit.step, self._rate(fit.step)
        first = fit.data.position
        switched = self._switched(snapshot)
        if self._restore == "all":
            skipped = self._first_batch(snapshot, cause, fit) - snapshot.position
            if self.optim is not None and self.done and not switched:
                self._use_optimizer(fit, original=True)
            restore(snapshot, fit, detector, skip_batches=skipped)
            first, rate = snapshot.position, self._rate(snapshot.step)
        else:
            restore_history(snapshot, fit, detector)
            if detector.step_cut is not None:  # the step size that was lost is not lost once more
                detector.step_cut.reset()
            if self._restore == "accumulators":
                self._give_back_accumulators(snapshot, fit, switched=switched)
        ring.forget_after(snapshot.step, now=before)
        record = self._record(cause, snapshot, fit, first=first)
        self.done = [*self.done, record]
        if self.optim is not None and (len(self.done) == 1 or (self._restore == "all" and not switched)):
            self._switch(fit)
            rate = 1.0  # it has the rate of the configuration
        if detector.step_cut is not None:
            detector.step_cut.watch(fit.trainer.optimizers[0])
        scale_lr(fit.trainer, self._rate(before) / rate)
        record["lr"] = float(fit.trainer.optimizers[0].param_groups[0]["lr"])
        self._write(fit, record)
        text = f"rollback {record['try']} of {self.tries}: {self._done_what(record, snapshot)}"
        say(text, note=text)
        trackers.alert(fit.trainer.loggers, f"rollback at step {before}", text, serious=False)
        return True

    def kept(self, step: int) -> int:
        """How many of the steps up to a kept step were kept."""
        return step - sum(r["step"] - r["to_step"] for r in self.done if r["step"] <= step)

    def _choose(self, cause: Event, ring: SnapshotRing) -> TrainingState | None:
        before = [s for s in ring.snapshots if s.healthy and s.step < cause.step]
        far = [s for s in before if self.kept(s.step) <= self.kept(cause.step) - self._back_steps]
        return far[-1] if far else next(iter(before), None)

    def _in_vain(self, cause: Event, snapshot: TrainingState) -> str:
        """Why the rollback would end as the one before it, in words; empty where it may help.

        It goes back to the same snapshot, and the rate and the optimizer are those of the last time. Leaving out more
        batches helps where rows were at fault. They were not, where the run got as far as before on other rows.
        """
        if not self.done or self._restore != "all" or (self._lr_factor < 1 and not self._lr_steps):
            return ""
        last = self.done[-1]
        if last["snapshot_step"] != snapshot.step:
            return ""
        again = f"the run was lost again after the rollback to step {snapshot.step}"
        if not self._skip_batches:
            return f"{again}, on the same batches and at the same learning rate"
        learned = snapshot.detector is not None and snapshot.detector["classifier"]["auc"]["learned"]
        as_far = self.kept(cause.step) >= self.kept(last["event_step"])
        if learned or (self.kept(snapshot.step) and not as_far):
            return ""
        return (
            f"{again}, on other batches, and it had learned nothing by then; lower lr_mult, lengthen "
            "train.warmup_steps, or set callbacks.rollback.lr_factor below 1"
        )

    def _first_batch(self, snapshot: TrainingState, cause: Event, fit: Fit) -> int:
        """The batch to continue with, after the first batch of the event, also if batches were skipped before."""
        if not self._skip_batches:
            return snapshot.position
        batches_per_step = fit.trainer.accumulate_grad_batches
        last = next((r for r in reversed(self.done) if r["step"] < cause.step), {"batch": 0, "step": 0})
        event = last["batch"] + (cause.step - last["step"] - 1) * batches_per_step
        start = max(snapshot.position, event - self._back_steps * batches_per_step)
        again = 0
        for record in reversed(self.done):  # rollbacks since which no snapshot was taken
            if record["step"] <= snapshot.step:
                break
            again += 1
        return min(start + self._skip_batches * 2**again, fit.data.num_batches)

    def _rate(self, step: int) -> float:
        """Factor on the configured learning rate for the step after this one."""
        made = [record["step"] for record in self.done if record["step"] <= step]
        if not self._lr_steps:
            return self._lr_factor ** len(made)
        share = min((step - made[-1]) / self._lr_steps, 1.0) if made else 1.0
        return self._lr_factor + (1.0 - self._lr_factor) * share

    # The optimizer.

    def _switched(self, snapshot: TrainingState) -> bool:
        """Whether the other optimizer had taken over when the snapshot was taken."""
        return any(record["step"] <= snapshot.step for record in self.done)

    def _use_optimizer(self, fit: Fit, *, original: bool = False) -> None:
        """Lets the module make the other optimizer from now on, or the run's own; makes it if the fit is running."""
        if self.optim is None:
            return
        self._original = self._original or fit.module.optimizer_factory
        fit.module.optimizer_factory = self._original if original else self.optim
        if fit.trainer.optimizers:
            fit.trainer.strategy.setup_optimizers(fit.trainer)

    def _switch(self, fit: Fit) -> None:
        """Makes the other optimizer, with the state of the one in use and at the same place of the schedule."""
        net = fit.module.net
        old = state_by_name(net, fit.trainer.optimizers[0])
        last = [config.scheduler.last_epoch for config in fit.trainer.lr_scheduler_configs]
        self._use_optimizer(fit)
        wanted = initial_state(net, made_optimizer(fit.module.configure_optimizers))
        take_over(old, net, fit.trainer.optimizers[0], wanted)
        for config, epoch in zip(fit.trainer.lr_scheduler_configs, last, strict=True):
            schedule = cast(LambdaLR, config.scheduler)
            schedule.last_epoch = epoch
            groups = fit.trainer.optimizers[0].param_groups
            for group, base, shape in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = base * shape(epoch)

    def _give_back_accumulators(self, snapshot: TrainingState, fit: Fit, *, switched: bool) -> None:
        """Puts the optimizer's state of the snapshot into the one in use, by name of the parameter."""
        net, optimizer = fit.module.net, fit.trainer.optimizers[0]
        in_use = fit.module.optimizer_factory
        if self._original is not None and not switched:
            fit.module.optimizer_factory = self._original
        then, state = made_optimizer(fit.module.configure_optimizers), copied(snapshot.optimizer)
        if fit.module.large is not None:
            for index, tensors in fit.module.large.put_back_state(snapshot.mark, then).items():
                state["state"].setdefault(index, {}).update(tensors)
        then.load_state_dict(state)
        fit.module.optimizer_factory = in_use
        take_over(state_by_name(net, then), net, optimizer, state_by_name(net, optimizer))
        if fit.module.large is not None:  # rows changed in place: this tells whoever follows the optimizer's state
            optimizer.load_state_dict(optimizer.state_dict())

    # The record.

    def _record(self, cause: Event, snapshot: TrainingState, fit: Fit, *, first: int) -> dict[str, Any]:
        """The rollback as it stands in events.jsonl and summary.json. Batches from ``first`` on were left out."""
        data = fit.data
        ranges = data.row_ranges(first, data.position)
        return {
            "kind": "rollback",
            "step": fit.step,  # the last undone step; the next step has the number after it
            "to_step": snapshot.step if self._restore == "all" else fit.step,
            "try": len(self.done) + 1,
            "restored": self._restore,
            "snapshot_step": snapshot.step,
            "cause": cause.kind,
            "event_step": cause.step,
            "batch": data.position,  # the next one
            "skipped_batches": [first, data.position],  # the first, and the one after the last
            "skipped_row_span": [int(ranges[:, 0].min()), int(ranges[:, 1].max())] if len(ranges) else None,
            "skipped_rows": int((ranges[:, 1] - ranges[:, 0]).sum()),
            "lr": 0.0,
            "reason": cause.reason,
        }

    def _write(self, fit: Fit, record: dict[str, Any]) -> None:
        """Writes the rollback to events.jsonl and the trackers, and the rows that were left out to a file."""
        if self._folder is not None and fit.trainer.is_global_zero:
            self._folder.append_event(record)
        self._list_rows(fit)
        fit.module.record({metric_names.divergence("rollback"): float(record["snapshot_step"])})

    def _done_what(self, record: dict[str, Any], snapshot: TrainingState) -> str:
        if self._restore == "all":
            first, stop = record["skipped_batches"]
            text = f"from step {record['step']} to {snapshot.step}, "
            text += f"batches {first} to {stop - 1} left out" if stop > first else "no batch left out"
        elif self._restore == "accumulators":
            text = f"accumulators of step {snapshot.step} at step {record['step']}, weights kept"
        else:
            text = f"weights and accumulators of step {record['step']} kept"
        if self.optim is not None:
            text += "; the other optimizer from here on"
        if self._lr_factor < 1:
            text += f"; learning rate {record['lr']:.3g}"
        return text

    def _list_rows(self, fit: Fit) -> None:
        if self._folder is not None and fit.trainer.is_global_zero:
            self._folder.save_skipped_rows([(r["try"], fit.data.row_ranges(*r["skipped_batches"])) for r in self.done])
