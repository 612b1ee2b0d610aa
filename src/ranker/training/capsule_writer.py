"""Writes a capsule on a divergence: the snapshot before it and the batches around it, for scripts/replay.py."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from ranker.capsules import capsule as files
from ranker.capsules.capsule import Manifest
from ranker.capsules.recorder import Entry, Recorder
from ranker.capsules.training_state import State
from ranker.data.batch import Batch
from ranker.data.schema import SCHEMA_FILE
from ranker.errors import UserError, suggest
from ranker.runs.provenance import arithmetic
from ranker.runs.run_folder import RunFolder, versions
from ranker.stability import Event, pack
from ranker.training.divergence_watch import DivergenceWatch
from ranker.training.module import RankingModule
from ranker.training.progress import TrainingProgress
from ranker.training.snapshot_ring import SnapshotRing
from ranker.training.snapshots import Snapshot, capture

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Callback)

CAPSULES = "capsules"
EVENTS = ("full", "micro", "both")
_NOTICED = 30  # steps until a divergence is under suspicion, with the usual interval between two looks
_AHEAD = 16  # batches that a trainer may have fetched but not trained on


class Capsules(Callback):
    """Keeps the recent past of a run, and writes it down when the divergence watch reports an event.

    Some verdicts come hundreds of steps after the first one of the event, so what the detector has under suspicion is
    held on to until the matter is settled. All ranks come to the same verdict at the same step, and so all of them
    write, each the rows it has trained on. Where what came before an event is no longer there, the capsule starts at
    the oldest snapshot that is, and says so; without any before the event, none is written.

    The snapshots are those of the ring; a run that goes back to one of them begins a new past here, with a snapshot of
    its own. Stands behind the divergence watch and the ring in conf/callbacks.

    Args:
        events: which: ``full``, ``micro`` or ``both``.
        steps_before: a capsule begins at least so many steps before the event.
        steps_after: and ends so many after its first step, or where training stands when the verdict comes.
        max_megabytes: of the batches kept, in host memory and in a capsule; a snapshot comes on top.
        max_capsules: of a run; the last is left for a full divergence.

    Raises:
        UserError: a setting out of range.
    """

    def __init__(
        self,
        *,
        events: Literal["full", "micro", "both"] = "both",
        steps_before: int = 20,
        steps_after: int = 30,
        max_megabytes: float = 256.0,
        max_capsules: int = 3,
    ) -> None:
        if events not in EVENTS:
            raise UserError(f"callbacks.capsules.events '{events}' is unknown; {suggest(events, EVENTS)}")
        for name, value, least in (
            ("steps_before", steps_before, 0),
            ("steps_after", steps_after, 1),
            ("max_megabytes", max_megabytes, 1),
            ("max_capsules", max_capsules, 1),
        ):
            if value < least:
                raise UserError(f"callbacks.capsules.{name} must be at least {least}, got {value}")
        self._kinds = ("full", "micro") if events == "both" else (events,)
        self._before, self._after = steps_before, steps_after
        self._max_capsules, self._max_megabytes = max_capsules, max_megabytes
        self._recorder = Recorder(int(max_megabytes * 1e6))
        self._number = -1  # of the last batch trained on
        self._turn = 0  # step at which the run last went on from somewhere else
        self._past: list[Snapshot] = []  # the ring's since then; a rollback drops them before its event is written
        self._host: dict[int, Batch] = {}  # batches as the loader gave them, until they have been trained on
        self._seen = self._written = self._step = 0
        self._held: Snapshot | None = None  # where a capsule of that would begin
        self._since: int | None = None  # first step of what is under suspicion
        self.folder: RunFolder | None = None
        self.cfg: DictConfig | None = None

    # Recording.

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens to the loader: a batch is kept where it lay in host memory, not on the device."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        inner = datamodule.watch_training
        datamodule.watch_training = lambda loader: _Overheard(inner(loader), self._host)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins where training begins."""
        watch = _callback(trainer, DivergenceWatch)
        self._seen = len(watch.detector.events) if watch and watch.detector else 0
        self._step = self._turn = trainer.global_step
        self._number = trainer.datamodule.position - 1  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Notices that the run goes on from somewhere else: the past before has not led here."""
        assert isinstance(pl_module, RankingModule)
        if batch.number != self._number + 1:
            self._turn = trainer.global_step
            self._past = [capture(trainer, pl_module)]
            self._recorder.clear()
            self._since = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Records the step, writes what has become of an event, and holds on to what is under suspicion."""
        assert isinstance(pl_module, RankingModule)
        assert pl_module.signals is not None
        signals = pl_module.signals
        completed = trainer.global_step != self._step
        self._step, self._number = trainer.global_step, batch.number
        row = pack(signals.losses_T, signals.auc_T, signals.spread_T, signals.nonfinite)
        self._recorder.add(self._step + (not completed), self._host.pop(batch.number, batch), row)
        self._follow_ring(trainer)
        self.look(trainer, pl_module)
        # Let go of what no event can need that begins from now on, or is about to be noticed.
        needed = max((s.step for s in self._past if s.step <= self._step - self._before - _NOTICED), default=-1)
        self._past = [s for s in self._past if s.step >= needed or s is self._held]
        self._recorder.forget(needed)

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Writes what has become of an event, and holds on to what is under suspicion. All ranks call it."""
        watch = _callback(trainer, DivergenceWatch)
        if watch is None or watch.detector is None:
            return
        events, self._seen = watch.detector.events[self._seen :], len(watch.detector.events)
        for event in events:
            if event.kind in self._kinds:
                self._write(trainer, module, event)
        suspicion = watch.detector.suspicion
        since = suspicion.step if suspicion else None
        if since != self._since:
            self._since = since
            self._hold(trainer, since)

    def state_dict(self) -> dict[str, Any]:
        """How many capsules the run has."""
        return {"written": self._written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self._written = state_dict["written"]

    def _follow_ring(self, trainer: pl.Trainer) -> None:
        newest = self._past[-1].step if self._past else self._turn - 1
        if (ring := _callback(trainer, SnapshotRing)) is not None:
            self._past += [s for s in ring.snapshots if s.step > newest]

    def _hold(self, trainer: pl.Trainer, since: int | None) -> None:
        self._held = None if since is None else self._start(trainer, since)
        if since is None or self._held is None:
            self._recorder.hold(0, -1)
        else:
            self._recorder.hold(self._held.step, since + self._after)

    def _start(self, trainer: pl.Trainer, step: int) -> Snapshot | None:
        """The snapshot that a capsule of an event at this step begins with; on all ranks that of the same step."""
        covered = _greatest(trainer, self._recorder.covers_after(min(step, self._step)))
        there = [s for s in self._past if covered <= s.step < step]
        early = [s for s in there if s.step < step - self._before]
        return early[-1] if early else there[0] if there else None

    # Writing.

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule, event: Event) -> None:
        assert isinstance(module, RankingModule)
        assert self.folder is not None
        if self._written >= self._max_capsules - (event.kind != "full" and self._max_capsules > 1):
            return _say(trainer, f"no capsule of step {event.step}: there are {self._written}, see max_capsules")
        start = self._start(trainer, event.step)
        if start is None:
            return _say(
                trainer,
                f"no capsule of step {event.step}: no snapshot from before it with all batches since; see "
                f"callbacks.snapshots, and callbacks.capsules.max_megabytes (now {self._max_megabytes:g})",
            )
        state = state_of(start)
        entries = self._recorder.between(start.step, event.step + self._after)
        final = self.folder.path / CAPSULES / f"step={event.step}"
        temporary = final.with_name(f".{final.name}.tmp")
        wrong = ""
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            shares = [entry.batch for entry in entries]
            files.write_share(temporary / files.share_file(trainer.global_rank), shares, state.auc)
            if trainer.is_global_zero:
                self._write_common(trainer, module, event, state, entries, temporary)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter for a full disk
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if _greatest(trainer, int(bool(wrong))):
            _say(trainer, f"no capsule of step {event.step}: {wrong or 'another rank could not write its share'}")
            return shutil.rmtree(temporary, ignore_errors=True) if trainer.is_global_zero else None
        self._written += 1
        if trainer.is_global_zero:
            missing = [r for r in range(trainer.world_size) if not (temporary / files.share_file(r)).is_file()]
            if missing:
                _say(trainer, f"capsule of step {event.step}: ranks {missing} write to another disk; add their files")
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            _say(trainer, f"capsule of the {event.kind} divergence; replay it: python scripts/replay.py {final}")

    def _write_common(
        self, trainer: pl.Trainer, module: RankingModule, event: Event, state: State, entries: list[Entry], folder: Path
    ) -> None:
        assert self.cfg is not None
        note = ""
        if state.step >= event.step - self._before and state.step > 0:
            note = f"begins {event.step - state.step} steps before the event: what came before was no longer there"
        signals_SN = torch.stack([entry.signals for entry in entries]).cpu()
        files.write_state(folder / files.SNAPSHOT, state)
        (folder / files.CONFIG).write_text(OmegaConf.to_yaml(self.cfg, resolve=True), encoding="utf-8")
        module.schema.to_yaml(folder / SCHEMA_FILE)
        manifest = Manifest(
            event=event,
            snapshot_step=state.step,
            steps=[entry.step for entry in entries],
            numbers=[entry.batch.number for entry in entries],
            signals=files.hexadecimal(signals_SN),
            tasks=module.schema.task_names,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            seed=int(self.cfg.seed),
            versions=versions(),
            machine=arithmetic(trainer.strategy.root_device),
            note=note,
        )
        files.write_manifest(folder, manifest)


def state_of(snapshot: Snapshot) -> State:
    """What a replay needs of a snapshot."""
    state = snapshot.state
    detector = state["detector"].get("detector")
    return State(
        step=snapshot.step,
        net={name.removeprefix("net."): x for name, x in state["module"].items() if name.startswith("net.")},
        optimizer=state["optimizer"],
        schedule=state["schedulers"][0] if state["schedulers"] else None,
        auc=state["module"]["train_auc._extra_state"],
        detector=None if detector is None else detector | {"unreported": []},  # events of the run, not of its replay
        rng=state["rng"]["torch"],
    )


class _Overheard:
    """Notes a loader's batches as they pass."""

    def __init__(self, loader: Iterable[Batch], noted: dict[int, Batch]) -> None:
        self._loader, self._noted = loader, noted

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self._noted[batch.number] = replace(batch, opening=None)
            while len(self._noted) > _AHEAD:
                del self._noted[next(iter(self._noted))]
            yield batch


def _callback(trainer: pl.Trainer, kind: type[C]) -> C | None:
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]


def _greatest(trainer: pl.Trainer, value: int) -> int:
    """Over all ranks, which must all call."""
    if trainer.world_size == 1:
        return value
    shared = torch.tensor(value, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def _say(trainer: pl.Trainer, line: str) -> None:
    """Tells the person, above the bar where there is one."""
    bar = _callback(trainer, TrainingProgress)
    if trainer.is_global_zero:
        bar.say(line) if bar is not None else log.warning(line)
