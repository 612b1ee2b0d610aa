"""Sharded tables in a run: where they start, their learning rate, checkpoints, and going back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from torch.optim import Optimizer

from ranker.errors import UserError
from ranker.models.sharded_embeddings import ShardedTables
from ranker.runs.checkpoint_files import BEST, SHARDS, by_step, path_of, shards_of, step_of
from ranker.runs.run_folder import SHARDED
from ranker.training import sharded_checkpoint
from ranker.training.row_journal import RowJournal

log = logging.getLogger(__name__)


class TablesOfRun:
    """What the Lightning module does with sharded tables, which are no parameters of it.

    Checkpoints go into ``checkpoints/shards/step=N``, written before the checkpoint that needs them. Folders that no
    checkpoint needs any more are removed when the next one is written.

    Args:
        tables: the tables of the net.
        group: settings of the tables' parameter group in the optimizer; its learning rate is the tables'.

    Attributes:
        tables: as given.
        folder: the checkpoint folder of the run; None: checkpoints are refused.
        journal: for snapshots; None before ``start``.
    """

    def __init__(self, tables: ShardedTables, group: Mapping[str, Any]) -> None:
        self.tables = tables
        self.folder: Path | None = None
        self.journal: RowJournal | None = None
        self._group = dict(group)
        self._processes: dist.ProcessGroup | None = None
        self._step_on_disk = -1

    def start(self, trainer: pl.Trainer) -> None:
        """Shards the tables, once. The processes of the run have met by now; a run of one process meets itself.

        Raises:
            UserError: torchrec is missing, or has no plan.
        """
        if self.tables.is_sharded:
            return
        if not dist.is_initialized():
            backend = "nccl" if trainer.strategy.root_device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self._processes = dist.group.WORLD
        assert self._processes is not None
        self.tables.shard(self._processes, trainer.strategy.root_device)
        self.journal = RowJournal(self.tables.collection.shards)
        self.tables.collection.on_lookup(self.journal.note)
        if trainer.is_global_zero:
            log.info("embeddings: %s", self.tables.described())

    def join(self, optimizer: Optimizer) -> Optimizer:
        """Adds a group to the optimizer that has the tables' learning rate, so that schedules and rollbacks set it."""
        named = "param_names" in optimizer.param_groups[0]
        handle: Any = ("embeddings", self.tables.handle) if named else self.tables.handle
        optimizer.add_param_group({"params": [handle], **self._group})
        return optimizer

    def use_rate(self, optimizer: Optimizer) -> None:
        """Gives the backward pass that comes next the learning rate of its group."""
        own = next(g for g in optimizer.param_groups if any(p is self.tables.handle for p in g["params"]))
        self.tables.set_learning_rate(float(own["lr"]))

    def mark(self, step: int, *, keep: Collection[int]) -> None:
        """Makes the tables of now a place to go back to; of the earlier ones, those of the steps to keep stay."""
        assert self.journal is not None
        self.journal.keep(keep)
        self.journal.mark(step)

    def go_back(self, step: int) -> None:
        """Puts the tables back to where they were at the mark of a step."""
        assert self.journal is not None
        self.journal.go_back(step)

    def save(self, step: int) -> dict[str, Any]:
        """Writes the tables of a step; what the checkpoint says of them. All ranks call it.

        Raises:
            UserError: they cannot be written.
        """
        assert self._processes is not None
        assert self.folder is not None
        if step != self._step_on_disk:
            if dist.get_rank(self._processes) == 0:
                self._tidy()
            target = shards_of(path_of(self.folder, step))
            sharded_checkpoint.save(self.tables.collection.sharded_state(), target, self._processes)
            self._step_on_disk = step
        return {"tables": [[t.name, t.rows, t.dim] for t in self.tables.tables], "plan": self.tables.collection.plan}

    def load(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Reads the tables of a checkpoint. All ranks call it.

        Raises:
            UserError: it has no tables, or others.
        """
        assert self._processes is not None
        if SHARDED not in checkpoint:
            raise UserError(f"{path} is of a run with embeddings=local; a resumed run keeps its tables where they are")
        sharded_checkpoint.load(self.tables.collection.sharded_state(), shards_of(path), self._processes)
        if self.folder is not None and shards_of(path).parent == self.folder / SHARDS:
            self._step_on_disk = step_of(path)

    def _tidy(self) -> None:
        """Removes the folders of checkpoints that are gone, and what a killed process left."""
        assert self.folder is not None
        needed = {path.stem for path in (*by_step(self.folder), *by_step(self.folder / BEST))}
        for folder in (self.folder / SHARDS).glob("*"):
            if folder.name not in needed:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.folder / SHARDS).glob(".*.draft"):
            shutil.rmtree(folder, ignore_errors=True)
