"""The ring of snapshots that a run can go back to: in host memory, the newest ones also on disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from ranker.errors import UserError
from ranker.runs.run_folder import RunFolder
from ranker.training.module import RankingModule
from ranker.training.snapshots import Snapshot, capture, is_healthy

logger = logging.getLogger(__name__)


class SnapshotRing(Callback):
    """Takes a snapshot every so many steps and keeps the newest ones.

    While the detector suspects something nothing is taken, and so nothing falls out: what was there before the event
    stays, however long the verdict takes. It stands behind the divergence watch in conf/callbacks, so that the watch
    has seen the step.

    On disk, ``snapshots/rank<r>/step=<n>.pt`` holds what a resumed run may need: files up to the checkpoint's step are
    read back, later ones removed. Memory: ``keep`` times weights and optimizer state, on the host of each rank.

    Args:
        every: steps between two snapshots; 0 takes none.
        keep: snapshots in memory.
        disk: how many of them, the newest, are also on disk; 0 writes none.

    Attributes:
        every: as given.
        folder: the run folder; nothing is written without one.
        snapshots: oldest first.

    Raises:
        UserError: a number out of range.
    """

    def __init__(self, *, every: int = 50, keep: int = 6, disk: int = 0) -> None:
        if every < 0 or keep < 1 or not 0 <= disk <= keep:
            raise UserError(
                f"callbacks.snapshots: every >= 0, keep >= 1 and 0 <= disk <= keep are needed, got every={every}, "
                f"keep={keep}, disk={disk}"
            )
        self.every, self._keep, self._disk = every, keep, disk
        self._path: Path | None = None
        self._newest_step = -1
        self.folder: RunFolder | None = None
        self.snapshots: list[Snapshot] = []

    def newest(self, *, until: int) -> Snapshot | None:
        """The newest healthy snapshot of a step or an earlier one; None where there is none."""
        return next((s for s in reversed(self.snapshots) if s.step <= until), None)

    def forget_after(self, step: int, *, now: int) -> None:
        """Drops the snapshots of later steps: a rollback has undone them, and takes none at the step it does so."""
        self._newest_step = now
        self.snapshots = [s for s in self.snapshots if s.step <= step]
        self._tidy_disk()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads back what a resumed run left on disk, and takes the first snapshot."""
        self._path = None if self.folder is None else self.folder.path / "snapshots" / f"rank{trainer.global_rank}"
        self._read_back(trainer)
        if self.every and not self.snapshots:  # a resumed run's ring should be that of one that was not interrupted
            self._take(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes a snapshot when its time has come."""
        step = trainer.global_step
        if self.every and step % self.every == 0 and step != self._newest_step:
            self._take(trainer, pl_module)

    def _take(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, RankingModule)
        self._newest_step = trainer.global_step
        if not is_healthy(trainer):
            return
        # The oldest goes first, so that memory never holds one more.
        self.snapshots = self.snapshots[max(0, len(self.snapshots) - self._keep + 1) :]
        snapshot = capture(trainer, module)
        self.snapshots = [*self.snapshots, snapshot]
        if self._disk and self._path is not None:
            path = self._path / f"step={snapshot.step}.pt"
            try:
                snapshot.save(path)
            except (OSError, RuntimeError) as error:  # torch.save raises the latter for a full disk
                self._disk = 0  # and the older ones go: a rollback needs those in memory alone, a full disk the room
                reason = " ".join(str(error).split())
                logger.warning("no more snapshots on disk, %s cannot be written: %s", path, reason)
            self._tidy_disk()

    def _read_back(self, trainer: pl.Trainer) -> None:
        steps = sorted(self._on_disk())
        if dist.is_available() and dist.is_initialized():  # one rank may have been killed before it wrote its file
            everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, steps)
            steps = sorted(set.intersection(*map(set, everyone)))
        files = self._on_disk()
        self.snapshots = [Snapshot.load(files[n]) for n in steps if n <= trainer.global_step][-self._keep :]
        self._tidy_disk()

    def _on_disk(self) -> dict[int, Path]:
        if self._path is None:
            return {}
        return {int(path.stem.removeprefix("step=")): path for path in self._path.glob("step=*.pt")}

    def _tidy_disk(self) -> None:
        wanted = {s.step for s in self.snapshots[len(self.snapshots) - self._disk :]} if self._disk else set()
        for step, path in self._on_disk().items():
            if step not in wanted:
                path.unlink(missing_ok=True)
