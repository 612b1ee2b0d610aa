"""Records the recent past of a run, and writes a capsule of it on a divergence, for scripts/replay.py."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig, OmegaConf

from ranker.capsules import capsule as files
from ranker.capsules.capsule import Manifest
from ranker.capsules.training_state import TrainingState
from ranker.data.batch import Batch
from ranker.data.schema import SCHEMA_FILE
from ranker.errors import UserError, suggest
from ranker.installation import command_line
from ranker.runs.provenance import arithmetic
from ranker.runs.run_folder import RunFolder, versions
from ranker.stability import DivergenceDetector, Event
from ranker.training.capsule_recorder import Entry, Overheard, Recorder
from ranker.training.compact_capsule import Compact, compact
from ranker.training.deferred_signals import LateSignals
from ranker.training.fit import Fit
from ranker.training.progress import Say, say_in_log
from ranker.training.sharded_to_local import local_config
from ranker.training.snapshots import SnapshotRing, capture

CAPSULES = "capsules"
EVENTS = ("full", "micro", "both")
_ENDS = ("full", "unsettled")  # kinds of events with which a run ends
_LATE = 400  # steps by which a verdict may come late without any suspicion before it
_HOLDS = 2  # suspected events whose past is kept, also after the suspicion has ended


class CapsuleWriter:
    """Keeps the recent past of a run, and writes it when the detector reports an event.

    Some verdicts come hundreds of steps after the first step of the event. So the batches of about the last 400 steps
    are kept, as far as the bound allows, and the past of the last two suspected events longer, also after the suspicion
    has ended: a spike whose loss comes back may be found to be lost later. All ranks reach the same verdict at the same
    step, and each writes the rows it has trained on.

    If the past before an event is no longer complete, the capsule starts at the oldest snapshot from which it is, and
    says so. A full divergence always has a capsule: where no snapshot from before it is left, the capsule has the steps
    before the verdict. A full divergence that began as a micro divergence takes over the capsule of that.

    The snapshots are those of the ring. After a rollback a new past begins, with a snapshot of its own.

    Of tables that snapshots do not copy, a capsule has the rows that its batches use (``compact_capsule``).

    Args:
        events: which events to write: ``full``, ``micro`` or ``both``.
        steps_before: a capsule begins at least this many steps before the event.
        steps_after: a capsule ends this many steps after the event's first step, or at the step of the verdict if that
            is earlier.
        max_megabytes: bound on the batches, in host memory and in a capsule; the snapshot comes on top.
        max_capsules: number of capsules per run; the last one is reserved for a full divergence, and a further full
            divergence replaces the newest.
        folder: the run folder; without one no capsule is written.
        cfg: the configuration of the run, in a capsule with every interpolation resolved.
        say: shows messages.

    Attributes:
        grouped: whether the run is trained as one with others, which the capsule says.
        written: first steps of the events that have a capsule, in the order in which they were written.

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
        folder: RunFolder | None = None,
        cfg: DictConfig | None = None,
        say: Say = say_in_log,
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
        self._folder, self._cfg, self._say = folder, cfg, say
        self._recorder = Recorder(int(max_megabytes * 1e6))
        self._number = -1  # of the last batch trained on
        self._turn = 0  # step at which training started, or continued after a rollback
        self._past: list[TrainingState] = []  # the ring's since then; kept here, because a rollback empties the ring
        self._host: dict[int, Batch] = {}  # batches in host memory that have not been trained on yet
        self._step = 0
        self._held: dict[int, TrainingState] = {}  # by first step of a suspected event, where its capsule would begin
        self._since: int | None = None  # first step of the event that is suspected now
        self.grouped = False
        self.written: list[int] = []

    # Recording.

    def overheard(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Wraps the training loader to keep references to its batches in host memory rather than on the device."""
        return Overheard(loader, self._host)

    def start(self, fit: Fit) -> None:
        """Begins at the first batch of training."""
        self._step = self._turn = fit.step
        self._number = fit.data.position - 1

    def before_batch(self, fit: Fit, batch: Batch, detector: DivergenceDetector) -> None:
        """Starts a new past if this batch does not follow the last one: the old past has not led here."""
        if batch.number != self._number + 1:
            self._turn = fit.step
            self._past = [capture(fit, detector)]
            self._recorder.clear()
            self._since, self._held = None, {}

    def break_off(self) -> None:
        """The state was changed between two batches: the next batch starts a new past."""
        self._number = -2

    def after_batch(
        self,
        fit: Fit,
        batch: Batch,
        signals: LateSignals,
        *,
        step: int,
        events: list[Event],
        detector: DivergenceDetector,
        ring: SnapshotRing | None,
    ) -> None:
        """Records the batch, writes capsules of new events, and drops what no event can need any more.

        Args:
            fit: the running fit.
            batch: the batch just trained on.
            signals: its signals on this rank.
            step: the optimizer step it belongs to.
            events: events reported since the last call.
            detector: the detector, after this batch.
            ring: the snapshots, before this batch.
        """
        self._step, self._number = fit.step, batch.number
        self._recorder.add(step, self._host.pop(batch.number, batch), signals.packed)
        there = ring.snapshots if ring is not None else []
        newest = self._past[-1].step if self._past else self._turn - 1
        self._past += [s for s in there if s.step > newest]
        self.write(fit, events)
        suspicion = detector.suspicion
        since = suspicion.step if suspicion else None
        if since != self._since:
            self._since = since
            if since is not None:
                self._hold(fit, since)
        needed = max((s.step for s in self._past if s.step <= self._step - self._before - _LATE), default=-1)
        kept = {s.step for s in (*there, *self._held.values())} | {self._turn}  # no snapshot that the ring has dropped
        held = {s.step for s in self._held.values()}
        self._past = [s for s in self._past if s.step in kept and (s.step >= needed or s.step in held)]
        self._recorder.forget(needed)

    def write(self, fit: Fit, events: list[Event]) -> None:
        """Writes capsules of new events. All ranks call it with the same events."""
        for event in events:
            if event.kind in self._kinds or (event.kind in _ENDS and "full" in self._kinds):
                self._write(fit, event)

    def _hold(self, fit: Fit, since: int) -> None:
        first = self._first(fit, since)
        if first is None:
            return
        self._held.pop(since, None)
        self._held = dict([*self._held.items(), (since, first)][-_HOLDS:])
        self._recorder.hold((state.step, step + self._after) for step, state in self._held.items())

    def _first(self, fit: Fit, step: int) -> TrainingState | None:
        """The snapshot with which a capsule of an event at this step begins; the same step on all ranks."""
        covered = fit.largest(self._recorder.covers_after(min(step, self._step)))
        there = [s for s in self._past if covered <= s.step < step and not (s.mark and s.mark.undone)]
        early = [s for s in there if s.step < step - self._before]
        return early[-1] if early else there[0] if there else None

    # Writing.

    def _write(self, fit: Fit, event: Event) -> None:
        if self._folder is None:
            return
        again = event.step in self.written
        ends = event.kind in _ENDS
        too_many = not again and len(self.written) >= self._max_capsules - (not ends and self._max_capsules > 1)
        if too_many and not ends:
            return self._say(f"no capsule of step {event.step}: there are {len(self.written)}, see max_capsules")
        state, until = self._first(fit, event.step), event.step + self._after
        if state is None and again:
            return self._take_over(fit, event)
        if state is None and ends:  # the steps before the verdict are better than nothing
            state, until = self._first(fit, self._step - self._after), self._step
        if state is None:
            return self._say(
                f"no capsule of step {event.step}: no snapshot from before it with all batches since; see "
                f"callbacks.snapshots, and callbacks.capsules.max_megabytes (now {self._max_megabytes:g})"
            )
        rank, first_rank = fit.trainer.global_rank, fit.trainer.is_global_zero
        entries = self._recorder.between(state.step, until)
        kept = Compact(batches=[entry.batch for entry in entries], schema=fit.module.schema, state=state, rows={})
        if state.mark is not None:
            kept = compact(fit, state, kept.batches)  # all ranks exchange their rows
        final = self._path(event.step)
        temporary = final.with_name(f".{final.name}.tmp")  # the same for all ranks
        wrong = ""
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            files.write_share(temporary / files.share_file(rank), kept.batches, state.auc)
            if kept.state is not None and first_rank:
                files.write_state(temporary / files.SNAPSHOT, kept.state)
                kept.schema.to_yaml(temporary / SCHEMA_FILE)
                if kept.rows:
                    files.write_rows(temporary / files.ROWS, kept.rows)
                self._write_common(fit, event, state, entries, temporary)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter for a full disk
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if fit.largest(int(bool(wrong))):
            self._say(f"no capsule of step {event.step}: {wrong or 'another rank could not write its share'}")
            return shutil.rmtree(temporary, ignore_errors=True) if first_rank else None
        if too_many:
            self._remove(fit, self.written[-1])
        if not again:
            self.written = [*self.written, event.step]
        if first_rank:
            ranks = range(fit.trainer.world_size)
            missing = [r for r in ranks if not (temporary / files.share_file(r)).is_file()]
            if missing:
                self._say(f"capsule of step {event.step}: ranks {missing} write to another disk; add their files")
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            self._say(f"capsule of the {event.kind} divergence; replay it: {command_line('replay')} {final}")

    def _path(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder.path / CAPSULES / f"step={step}"

    def _remove(self, fit: Fit, step: int) -> None:
        self.written = [other for other in self.written if other != step]
        if fit.trainer.is_global_zero:
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _take_over(self, fit: Fit, event: Event) -> None:
        """Gives a capsule that was written for the same first step the later verdict."""
        path = self._path(event.step)
        if fit.trainer.is_global_zero and (path / files.MANIFEST).is_file():
            files.replace_event(path, event)
            self._say(f"the capsule of step {event.step} is now of a {event.kind} divergence: {path}")

    def _write_common(
        self, fit: Fit, event: Event, state: TrainingState, entries: Sequence[Entry], folder: Path
    ) -> None:
        assert self._cfg is not None
        sharded = fit.module.tables is not None
        cfg = local_config(self._cfg) if sharded else self._cfg
        note = ""
        if state.step >= event.step:
            note = (
                f"begins {state.step - event.step} steps after the first step of the event: "
                "no snapshot from before it with all batches since was left"
            )
        elif state.step >= event.step - self._before and state.step > 0:
            note = f"begins {event.step - state.step} steps before the event: what came before was no longer there"
        signals_SN = torch.stack([entry.signals() for entry in entries]).cpu()
        (folder / files.CONFIG).write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        manifest = Manifest(
            event=event,
            snapshot_step=state.step,
            steps=[entry.step for entry in entries],
            numbers=[entry.batch.number for entry in entries],
            signals=files.hexadecimal(signals_SN),
            tasks=fit.module.schema.task_names,
            world_size=fit.trainer.world_size,
            accumulate=fit.trainer.accumulate_grad_batches,
            seed=int(self._cfg.seed),
            versions=versions(),
            machine=arithmetic(fit.module.device),
            note=note,
            sharded=sharded,
            grouped=self.grouped,
        )
        files.write_manifest(folder, manifest)
