"""Lightning's side of divergence detection: feeds every step, records events, stops a lost run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ranker.runs.run_folder import RunFolder
from ranker.stability import DivergenceDetector, Event, reduce_signals
from ranker.training.module import RankingModule
from ranker.training.progress import TrainingProgress


class DivergenceWatch(Callback):
    """Runs the detector on every step's signals.

    The detector is fed on the device and read every few steps, so that training does not wait for it.

    Args:
        poll_every: steps between two looks at the verdict.
        stop: end training when the model is lost.
        settings: arguments of DivergenceDetector; its defaults hold otherwise.

    Attributes:
        folder: the run folder; events are not written without one.
        detector: made when training starts.
        rescue: called with new events while training goes on, on every rank; True where it has mended the run.
    """

    def __init__(self, *, poll_every: int = 10, stop: bool = True, settings: Mapping[str, Any] | None = None) -> None:
        self._poll_every = poll_every
        self._stop = stop
        self._settings = dict(settings or {})
        self._state: dict[str, Any] | None = None
        self._taken = 0  # optimizer steps
        self.folder: RunFolder | None = None
        self.rescue: Callable[[pl.Trainer, RankingModule, list[Event]], bool] | None = None
        self.detector: DivergenceDetector | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the detector, on the model's device, and gives it a checkpoint's state."""
        assert isinstance(pl_module, RankingModule)
        self.detector = DivergenceDetector(pl_module.schema.task_names, device=pl_module.device, **self._settings)
        if self._state is not None:
            self.detector.load_state_dict(self._state)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins where training begins."""
        self._taken = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Feeds the batch under the step it belongs to; looks at the verdict now and then, between two steps."""
        assert isinstance(pl_module, RankingModule)
        assert self.detector is not None
        assert pl_module.signals is not None
        signals = pl_module.signals
        completed = trainer.global_step != self._taken  # gradients may be accumulated over several batches
        self._taken = trainer.global_step
        step = self._taken + (not completed)
        shared = reduce_signals(signals.losses_T, signals.auc_T, signals.spread_T, signals.nonfinite)
        self.detector.update(step, **shared)
        if completed and step % self._poll_every == 0:
            events = self._look(trainer, pl_module)
            if events and self.rescue is not None and self.rescue(trainer, pl_module, events):
                return
            if self.detector.status == "diverged" and self._stop:
                trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judges what is still open when training ends."""
        assert isinstance(pl_module, RankingModule)
        self._look(trainer, pl_module)

    def judge(self, trainer: pl.Trainer, module: RankingModule) -> None:
        """Gives the verdict on a run that has ended, with the hold-out's metrics at hand."""
        assert self.detector is not None
        aucs, nes = (
            [module.holdout.get(f"test/{task.name}/{metric}", math.nan) for task in module.schema.tasks]
            for metric in ("auc", "ne")
        )
        for event in self.detector.finish(eval_auc_T=aucs, eval_ne_T=nes):
            self.report(trainer, module, event)

    def state_dict(self) -> dict[str, Any]:
        """The detector's state: baselines, open jumps, counts."""
        return {"detector": self.detector.state_dict()} if self.detector else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the detector is made."""
        self._state = state_dict.get("detector")

    def _look(self, trainer: pl.Trainer, module: RankingModule) -> list[Event]:
        assert self.detector is not None
        events = self.detector.poll()
        for event in events:
            self.report(trainer, module, event)
        return events

    def report(self, trainer: pl.Trainer, module: RankingModule, event: Event) -> None:
        """Writes an event to events.jsonl, the tracker, and where the person looks."""
        if not trainer.is_global_zero:
            return
        if self.folder is not None:
            self.folder.append_event(event.to_dict())
        module.record({f"divergence/{event.kind}": float(event.step)})
        bar = next((c for c in trainer.callbacks if isinstance(c, TrainingProgress)), None)  # type: ignore[attr-defined]
        if bar is not None:
            bar.note = f"{_TITLES[event.kind]} at step {event.step}"
            bar.say(f"{_TITLES[event.kind]}: {event}")


_TITLES = {"micro": "micro divergence", "full": "full divergence", "shift": "new level of a loss"}
