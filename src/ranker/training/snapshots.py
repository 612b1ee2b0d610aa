"""Snapshots of a running fit: taking one, going back to one, and the ring that keeps some of each age."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ranker.capsules.training_state import Trained, TrainingState, copied
from ranker.errors import UserError
from ranker.runs.run_folder import RunFolder
from ranker.stability import DivergenceDetector
from ranker.training.fit import Fit
from ranker.training.large_tables import LargeTables
from ranker.training.lightning_private import refetch

log = logging.getLogger(__name__)


def capture(fit: Fit, detector: DivergenceDetector | None) -> TrainingState:
    """Copies the state of a running fit. Call it between two steps, such as in ``on_train_batch_end``.

    Gradients are not included: with ``accumulate_grad_batches`` call it right after a step. No rank waits for another.
    Cost: one copy of weights and optimizer state to the host, and on a GPU one wait for the device. Large tables are
    not copied: of each row, what it was is kept when a later step uses it for the first time.
    """
    rows = fit.module.rows
    mark = None if rows is None else rows.mark()
    rest = {} if fit.module.large is None else fit.module.large.rest()
    process = {"precision": fit.trainer.precision_plugin.state_dict(), **_generators(fit.module.device)}
    if fit.module.average is not None:
        process["average"] = copied(fit.module.average.state_dict())
    # Reading the detector's state judges all steps so far, so its verdict is asked for afterwards.
    state = _trained(fit, detector).capture(fit.step, data=fit.data.state_dict(), process=process, **rest)
    return replace(state, healthy=is_healthy(detector), mark=mark)


def is_healthy(detector: DivergenceDetector | None) -> bool:
    """Whether the detector objects to nothing, as of its last poll; True without a detector."""
    return detector is None or detector.status == "healthy"


def restore(state: TrainingState, fit: Fit, detector: DivergenceDetector | None, *, skip_batches: int = 0) -> None:
    """Puts a running fit into a state, bit by bit. The next batch is the one that came next then.

    Call it between two steps (``on_train_start``, ``on_train_batch_end``), on every rank, with that rank's state. The
    trainer's own batch in hand and those read ahead are dropped. ``trainer.global_step`` is not set back, because
    trackers and files need steps that count up.

    Args:
        state: what ``capture`` gave in this run, or in one of the same configuration and number of ranks.
        fit: the running fit.
        detector: the detector that watches it.
        skip_batches: number of batches to leave out from the state's position on.
    """
    rows = None if fit.module.rows is None else fit.module.rows.go_back(state.mark)
    _trained(fit, detector).restore(state, rows=rows)
    if state.process["precision"]:
        fit.trainer.precision_plugin.load_state_dict(copied(state.process["precision"]))
    if fit.module.average is not None:
        fit.module.average.load_state_dict(state.process.get("average", {}))
    fit.data.go_back(copied(state.data))
    fit.data.skip(skip_batches)
    refetch(fit.trainer)
    _set_generators(state, fit.module.device)  # last, because making loaders may draw numbers


def restore_history(state: TrainingState, fit: Fit, detector: DivergenceDetector | None) -> None:
    """Puts back the training AUC and the detector only: a verdict is withdrawn, and the run goes on where it is."""
    _trained(fit, detector).restore_history(replace(state, rng=None))


class SnapshotRing:
    """Takes a snapshot at a fixed interval and keeps some of each age, in host memory of each rank.

    The newest are kept as they were taken; the older they are, the more of them are dropped (``thinned``). A verdict
    may name a first step that lies hundreds of steps back, so one of them must be from before it. Nothing is taken
    while the detector is suspect, so nothing is dropped either: the snapshots before an event stay until the verdict,
    however long that takes. Memory: ``keep`` times weights and optimizer state, without those of large tables.

    On disk, ``snapshots/rank<r>/step=<n>.pt`` holds what a resumed run may need: the snapshots that the ring had at
    the checkpoint are read back, others are removed.

    Args:
        every: steps between two snapshots; 0 takes none.
        keep: number of snapshots in memory.
        disk: how many of the newest are also on disk; 0 writes none.
        rows_above: megabytes with accumulators above which a table with sparse gradients is not copied: its rows are
            kept as they are used (``LargeTables``). 0: never. It needs disk=0, because a file has all rows.
        folder: the run folder; without one nothing is written.

    Attributes:
        every: as given.
        keep: as given.
        snapshots: oldest first.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        *,
        every: int = 50,
        keep: int = 6,
        disk: int = 0,
        rows_above: float = 0.0,
        folder: RunFolder | None = None,
    ) -> None:
        if every < 0 or keep < 1 or not 0 <= disk <= keep:
            raise UserError(
                f"callbacks.snapshots: every >= 0, keep >= 1 and 0 <= disk <= keep are needed, got every={every}, "
                f"keep={keep}, disk={disk}"
            )
        if not 0 <= rows_above < math.inf:
            raise UserError(f"callbacks.snapshots.rows_above must be 0 (never) or more MB, got {rows_above}")
        self.every, self.keep, self._disk = every, keep, disk
        self._rows_above = 0.0 if disk else rows_above
        self._folder = folder
        self._path: Path | None = None
        self._newest_step = -1
        self._resumable: list[list[int]] = []  # steps of the ring at the last two checkpoints
        self.snapshots: list[TrainingState] = []

    def start(self, fit: Fit, detector: DivergenceDetector | None) -> None:
        """Reads back what a resumed run left on disk, or takes the first snapshot."""
        self._path = (
            None if self._folder is None else self._folder.path / "snapshots" / f"rank{fit.trainer.global_rank}"
        )
        if self.every:
            fit.module.large = LargeTables.of(fit, self._rows_above)
            self._check_memory(fit)
        if fit.module.large is None:  # files have whole tables
            self._read_back(fit.step)
        self._tidy_disk()
        if self.every and not self.snapshots:  # a resumed run should have the ring of an uninterrupted one
            self._take(fit, detector)

    def _check_memory(self, fit: Fit) -> None:
        """Refuses snapshots that cannot fit, before the system kills the process for them.

        Counted are weights and one value of optimizer state for each, as Adagrad has, of the run and of each snapshot.
        """
        whole = 2 * sum(p.nbytes for p in fit.module.net.parameters())
        state = whole - (0 if fit.module.large is None else fit.module.large.nbytes)
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if whole + self.keep * state > there:
            raise UserError(
                f"callbacks.snapshots: {self.keep} snapshots of {state / 2**30:,.1f} GiB do not fit beside the model "
                f"into the {there / 2**30:,.0f} GiB of this machine: lower callbacks.snapshots.keep, or set "
                "callbacks.snapshots.every=0 (then there is no rollback and no capsule)"
            )

    def after_step(self, fit: Fit, detector: DivergenceDetector | None) -> None:
        """Takes a snapshot if one is due. The detector must have seen the step."""
        if self.every and fit.step % self.every == 0 and fit.step != self._newest_step:
            self._take(fit, detector)

    def forget_after(self, step: int, *, now: int) -> None:
        """Drops the snapshots of later steps, which a rollback has undone; at this step no other one is taken."""
        self._newest_step = now
        self.snapshots = [s for s in self.snapshots if s.step <= step]
        self._tidy_disk()

    def state_dict(self) -> dict[str, Any]:
        """The steps of the snapshots, for a checkpoint. Their files stay until the second checkpoint after it."""
        self._resumable = [*self._resumable[-1:], [s.step for s in self.snapshots]]
        return {"steps": self._resumable[-1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Says which snapshots ``start`` reads back, where they are on disk."""
        self._resumable = [list(state["steps"])]

    def _take(self, fit: Fit, detector: DivergenceDetector | None) -> None:
        self._newest_step = fit.step
        if not is_healthy(detector):
            return
        # One is dropped first, so that memory never holds one more.
        kept = thinned([s.step for s in self.snapshots], fit.step, every=self.every, keep=self.keep)
        self.snapshots = [s for s in self.snapshots if s.step in kept]
        snapshot = capture(fit, detector)
        self.snapshots = [*self.snapshots, snapshot]
        if self._disk and self._path is not None:
            path = self._path / f"step={snapshot.step}.pt"
            try:
                snapshot.save(path)
            except (OSError, RuntimeError) as error:  # torch.save raises the latter for a full disk
                self._disk = 0  # older ones are removed too: a rollback needs memory alone, and the disk is full
                reason = " ".join(str(error).split())
                log.warning("no more snapshots on disk, %s cannot be written: %s", path, reason)
            self._tidy_disk()

    def _read_back(self, until: int) -> None:
        files = self._on_disk()
        wanted = set(self._resumable[-1]) if self._resumable else {step for step in files if step <= until}
        steps = sorted(wanted & files.keys())
        if dist.is_available() and dist.is_initialized():  # one rank may have been killed before it wrote its file
            everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, steps)
            steps = sorted(set.intersection(*map(set, everyone)))
        self.snapshots = [TrainingState.load(files[n]) for n in steps][-self.keep :]

    def _on_disk(self) -> dict[int, Path]:
        if self._path is None:
            return {}
        return {int(path.stem.removeprefix("step=")): path for path in self._path.glob("step=*.pt")}

    def _tidy_disk(self) -> None:
        wanted = set()
        if self._disk:
            held = ([s.step for s in self.snapshots], *self._resumable)
            wanted = {step for steps in held for step in steps[-self._disk :]}
        for step, path in self._on_disk().items():
            if step not in wanted:
                path.unlink(missing_ok=True)


def thinned(steps: Sequence[int], now: int, *, every: int, keep: int) -> list[int]:
    """Which of the snapshots to keep when one more is taken, so that their ages grow about twofold.

    The oldest is dropped once the second oldest is ``2^(keep - 2)`` intervals old. Otherwise the one is dropped that
    leaves the smallest hole relative to the age of its far side. With ``keep`` = 6 and one every 50 steps, the ages are
    0, 50, 100, 250, 550 and 1150 steps or fewer, and one is always at least 800 steps old.

    Args:
        steps: of the snapshots, ascending.
        now: step of the one that is about to be taken.
        every: steps between two.
        keep: number to keep, the new one included.
    """
    left = [*steps, now]
    while len(left) > max(keep, 1):
        last = len(left) - 1
        if last < 2 or now - left[1] >= every * 2 ** (keep - 2):
            drop = 0
        else:
            drop = min(range(1, last), key=lambda i: (left[i + 1] - left[i - 1]) / (now - left[i - 1]))
        del left[drop]
    return left[:-1]


def _trained(fit: Fit, detector: DivergenceDetector | None) -> Trained:
    schedules = [config.scheduler for config in fit.trainer.lr_scheduler_configs]
    return Trained(
        net=fit.module.net,
        optimizer=fit.trainer.optimizers[0],
        schedule=schedules[0] if schedules else None,  # type: ignore[arg-type]
        train_auc=fit.module.train_auc,
        detector=detector,
    )


def _generators(device: torch.device) -> dict[str, Any]:
    _, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, spare = random.getstate()
    return {
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(numbers), spare],
    }


def _set_generators(state: TrainingState, device: torch.device) -> None:
    process: Mapping[str, Any] = state.process
    if state.rng is not None:
        torch.set_rng_state(state.rng)
    if process["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(process["cuda"], device)
    keys, *rest = process["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, numbers, spare = process["python"]
    random.setstate((version, tuple(numbers.tolist()), spare))
