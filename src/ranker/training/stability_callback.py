"""The stability callback: divergence detection, rollback, snapshots and capsules, in the order in which they act."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ranker.data.batch import Batch
from ranker.errors import UserError, suggest
from ranker.runs import metric_names
from ranker.runs.run_folder import RunFolder
from ranker.stability import DetectorSettings, DivergenceDetector, Event, reduce_signals
from ranker.stability.carried_state import carried
from ranker.stability.step_cut import StepCut
from ranker.training import trackers
from ranker.training.capsule_writer import CapsuleWriter
from ranker.training.early_stop import EarlyStop
from ranker.training.fit import Fit
from ranker.training.module import RankingModule
from ranker.training.progress import Say, say_in_log
from ranker.training.rollback import Rollback
from ranker.training.snapshots import SnapshotRing
from ranker.training.training_step import make_step_cut

TITLES = {
    "micro": "micro divergence",
    "full": "full divergence",
    "shift": "new level of a loss",
    "unsettled": "unsettled divergence",
}


class DivergenceWatch:
    """The divergence detector of a run, and how often its verdict is read.

    The signals of every step are collected on the device. They are read only every few steps, so that training does not
    wait for the device.

    Args:
        poll_every: steps between two polls of the verdict.
        stop: end training when the model is lost.
        settings: fields of ``DetectorSettings`` that differ from its defaults.

    Attributes:
        poll_every: as given.
        stop: as given.
        detector: the detector; None before ``start``.

    Raises:
        UserError: a setting is unknown or out of range.
    """

    def __init__(self, *, poll_every: int = 10, stop: bool = True, settings: Mapping[str, Any] | None = None) -> None:
        self.poll_every, self.stop = poll_every, stop
        self._settings = dict(settings or {})
        known = [field.name for field in fields(DetectorSettings)]
        for name in self._settings:
            if name not in known:
                raise UserError(f"callbacks.divergence.settings: no setting '{name}'; {suggest(name, known)}")
        DetectorSettings(**self._settings)  # refuses values out of range now
        self.detector: DivergenceDetector | None = None

    def start(self, fit: Fit, state: Mapping[str, Any] | None) -> DivergenceDetector:
        """Makes the detector on the model's device; from a checkpoint's state if there is one."""
        self.detector = self.make(fit.module, fit.trainer.optimizers[0])
        if state is not None:
            self.detector.load_state_dict(state)
        return self.detector

    def make(self, module: RankingModule, optimizer: torch.optim.Optimizer) -> DivergenceDetector:
        """A new detector for a module and the optimizer that steps it."""
        step_cut = make_step_cut(module.net, optimizer)
        names = module.schema.task_names
        return DivergenceDetector(names, device=module.device, step_cut=step_cut, **self._settings)


class Stability(Callback):
    """Detects divergences, and records and mends them.

    ``on_train_batch_end`` gives the order in which the parts act. Each part is a plain object; without the divergence
    watch the others have nothing to act on.

    Args:
        divergence: the detector.
        snapshots: training states to go back to.
        capsules: writes a divergence to disk, for replay.
        rollback: goes back to a snapshot after a divergence.
        early_stop: ends a run whose progressive loss has become worse.
        folder: the run folder; without one no event is written.
        say: shows messages.

    Raises:
        UserError: there is a rollback, but no divergence watch or no snapshots.
    """

    def __init__(
        self,
        *,
        divergence: DivergenceWatch | None = None,
        snapshots: SnapshotRing | None = None,
        capsules: CapsuleWriter | None = None,
        rollback: Rollback | None = None,
        early_stop: EarlyStop | None = None,
        folder: RunFolder | None = None,
        say: Say = say_in_log,
    ) -> None:
        if rollback and rollback.tries and not (divergence and snapshots and snapshots.every):
            raise UserError(
                "callbacks.rollback needs callbacks.divergence, and callbacks.snapshots with every above 0; "
                "or switch it off: callbacks.rollback.tries=0"
            )
        self.divergence, self.snapshots, self.capsules, self.rollback = divergence, snapshots, capsules, rollback
        self.early_stop = early_stop
        self._folder, self._say = folder, say
        self._saved: Mapping[str, Any] | None = None  # the detector's state in the checkpoint
        self._earlier: tuple[Mapping[str, Any], dict[str, Any]] | None = None  # that of the run that this one continues
        self._step = 0  # optimizer steps taken

    @property
    def detector(self) -> DivergenceDetector | None:
        """The detector; None before training starts, and without a divergence watch."""
        return self.divergence.detector if self.divergence else None

    @property
    def kept_snapshots(self) -> int:
        """Number of snapshots in memory, at most."""
        return self.snapshots.keep if self.snapshots and self.snapshots.every else 0

    @property
    def rollbacks(self) -> list[dict[str, Any]]:
        """Records of the rollbacks of the run."""
        return self.rollback.done if self.rollback else []

    def carry_on(self, state: Mapping[str, Any], **how: Any) -> None:
        """Lets the detector begin with the history of an earlier run.

        Args:
            state: the detector's state there.
            **how: see ``ranker.stability.carried_state.carried``.
        """
        self._earlier = state, how

    def overheard(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Wraps the training loader, so that capsules can keep its batches."""
        return self.capsules.overheard(loader) if self.capsules and self.divergence else loader

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the detector. A checkpoint has been loaded by now."""
        if self.divergence:
            detector = self.divergence.start(Fit(trainer), self._saved)
            if self._earlier is not None and self._saved is None:
                state, how = self._earlier
                detector.load_state_dict(carried(state, detector.state_dict(), **how))
            self._earlier = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the first snapshot."""
        fit = Fit(trainer)
        self._step = fit.step
        if self.snapshots:
            self.snapshots.start(fit, self.detector)
        if self.capsules:
            self.capsules.start(fit)
        if self.rollback:
            self.rollback.start(fit)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Tells the capsules which batch comes next; after a rollback it does not follow the last one."""
        if self.capsules and self.detector:
            self.capsules.before_batch(Fit(trainer), batch, self.detector)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keeps the rows of large tables that the step moves, for the snapshots."""
        if (large := Fit(trainer).module.large) is not None:
            large.before_step()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Acts on one batch. Each part needs what the parts before it did.

        1. The detector gets the signals, under the step that the batch belongs to.
        2. At the poll interval its events are read and reported.
        3. The batch is recorded, and capsules of the new events are written, before a rollback removes the snapshots
           that they start from and puts back the rows of large tables.
        4. A rollback may restore an earlier state, or part of it; otherwise a lost run is stopped.
        5. A run that is not suspect may be stopped early, because the next windows are predicted ever worse.
        6. A snapshot is taken if the detector objects to nothing. After a rollback none is due at this step.
        """
        fit, detector = Fit(trainer), self.detector
        signals = fit.module.signals
        assert signals is not None
        completed = fit.step != self._step  # a step may accumulate the gradients of several batches
        self._step = fit.step
        step = self._step + (not completed)
        events: list[Event] = []
        rolled_back = False
        if completed and self.rollback:
            self.rollback.after_step(fit)
        if self.divergence and detector:
            if completed:
                signals.after_step(detector.step_cut)
            if signals.is_known:
                detector.update(step, **reduce_signals(**signals.values().as_dict()))
            else:
                detector.update_late(step, signals.packed)
            self._record_step_cut(fit, detector)
            if completed and step % self.divergence.poll_every == 0:
                events = self._poll(fit, detector)
            if self.capsules:
                self.capsules.after_batch(
                    fit, batch, signals, step=step, events=events, detector=detector, ring=self.snapshots
                )
            if completed and step % self.divergence.poll_every == 0:
                rolled_back = self._rolled_back(fit, events, detector)
                if not rolled_back and self.divergence.stop and detector.status == "diverged":
                    trainer.should_stop = True
        if completed and self.early_stop and not rolled_back and not trainer.should_stop:
            back = self.early_stop.after_step(fit, ring=self.snapshots, detector=detector, say=self._say)
            trainer.should_stop, rolled_back = back, back
        if self.snapshots:
            self.snapshots.after_step(fit, detector)
        if self.capsules and rolled_back:
            self.capsules.break_off()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the verdict on the last steps."""
        if self.detector:
            fit = Fit(trainer)
            self._write_capsules(fit, self._poll(fit, self.detector))

    def finish(self, trainer: pl.Trainer) -> None:
        """Reads the final verdict, after the hold-out was evaluated. All ranks call it."""
        if not self.detector:
            return
        fit = Fit(trainer)
        aucs, nes = (
            [
                fit.module.holdout.get(metric_names.task_metric(metric_names.TEST, task.name, metric), math.nan)
                for task in fit.module.schema.tasks
            ]
            for metric in ("auc", "ne")
        )
        events = self.detector.finish(eval_auc_T=aucs, eval_ne_T=nes)
        self._report(fit, events)
        self._write_capsules(fit, events)

    def state_dict(self) -> dict[str, Any]:
        """The detector's state, the number of capsules, the rollbacks and which snapshots there are, as files."""
        return {
            "detector": self.detector.state_dict() if self.detector else None,
            "capsules": self.capsules.written if self.capsules else [],
            "rollbacks": self.rollbacks,
            "snapshots": self.snapshots.state_dict() if self.snapshots else None,
            "early_stop": self.early_stop.state_dict() if self.early_stop else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint's state; the detector's is kept until the detector is made."""
        self._saved = state_dict["detector"]
        if self.capsules:
            written = state_dict["capsules"]  # their number in older checkpoints
            self.capsules.written = [0] * written if isinstance(written, int) else list(written)
        if self.snapshots and (held := state_dict.get("snapshots")):  # missing in older checkpoints
            self.snapshots.load_state_dict(held)
        if self.early_stop and (known := state_dict.get("early_stop")):
            self.early_stop.load_state_dict(known)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes over the rollbacks of a checkpoint: the optimizer that is made next must be the one it had."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if self.rollback and state is not None:
            self.rollback.load(Fit(trainer), state["rollbacks"])

    def _poll(self, fit: Fit, detector: DivergenceDetector) -> list[Event]:
        events = detector.poll()
        self._report(fit, events)
        return events

    def _report(self, fit: Fit, events: list[Event]) -> None:
        """Writes events to events.jsonl and the trackers, and shows them."""
        if not fit.trainer.is_global_zero:
            return
        for event in events:
            if self._folder is not None:
                self._folder.append_event(event.to_dict())
            fit.module.record({metric_names.divergence(event.kind): float(event.step)})
            fit.module.record_event(event.step)
            title = TITLES[event.kind]
            self._say(f"{title}: {event}", note=f"{title} at step {event.step}")
            if event.kind in ("full", "unsettled"):
                trackers.alert(
                    fit.trainer.loggers, f"{title} at step {event.step}", str(event), serious=event.kind == "full"
                )

    def _record_step_cut(self, fit: Fit, detector: DivergenceDetector) -> None:
        """Writes by how much each layer's step size was cut, when metrics are written; reading it waits."""
        if detector.step_cut is None or fit.step % fit.module.log_every or not fit.trainer.is_global_zero:
            return
        values = {name: x for layer in step_cut_values(detector.step_cut) for name, x in layer.items()}
        if values:
            fit.module.record(values)

    def _rolled_back(self, fit: Fit, events: list[Event], detector: DivergenceDetector) -> bool:
        if not (events and self.rollback and self.snapshots):
            return False
        done = self.rollback.roll_back(fit, events, ring=self.snapshots, detector=detector, say=self._say)
        if done and self.early_stop:
            self.early_stop.forget_after(self.rollbacks[-1]["to_step"])
        return done

    def _write_capsules(self, fit: Fit, events: list[Event]) -> None:
        if self.capsules:
            self.capsules.write(fit, events)


def step_cut_values(step_cut: StepCut) -> Iterator[dict[str, float]]:
    """By how much the step size was cut, of each layer, by the names of metrics.csv; reading it waits."""
    found = step_cut.by_layer()
    rows = torch.stack([torch.stack(layer) for layer in found.values()]).tolist() if found else []
    for layer, (cut, grown) in zip(found, rows, strict=True):
        names = metric_names.sign(layer, "step_cut"), metric_names.sign(layer, "step_cut_grown")
        yield {name: x for name, x in zip(names, (cut, grown), strict=True) if not math.isnan(x)}
