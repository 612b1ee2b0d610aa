"""Sharded tables in a run: where they start, their learning rate, checkpoints, and going back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ranker.capsules.training_state import TrainingState
from ranker.config import WarmStartSettings
from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.models.sharded_embeddings import ShardedTables
from ranker.models.sharding import Shard
from ranker.runs.checkpoint_files import BEST, SHARDS, by_step, path_of, shards_of, step_of
from ranker.runs.run_folder import SHARDED
from ranker.training import accumulators, sharded_checkpoint, weight_transfer
from ranker.training.fit import Fit
from ranker.training.row_journal import Mark, RowJournal
from ranker.training.sharded_to_local import local_state
from ranker.training.stored_tables import BLOCK, HANDLE, StoredTable
from ranker.training.weight_transfer import Kept

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
        self._trainer: pl.Trainer | None = None
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
        self._processes, self._trainer = dist.group.WORLD, trainer
        assert self._processes is not None
        self.tables.shard(self._processes, trainer.strategy.root_device)
        shards = self.tables.collection.shards
        self.journal = RowJournal([partial(_tensors, shard) for shard in shards], [len(s.weight) for s in shards])
        self.tables.collection.on_lookup(self._note)
        if trainer.is_global_zero:
            log.info("embeddings: %s", self.tables.described())

    def join(self, optimizer: Optimizer) -> Optimizer:
        """Adds a group to the optimizer that has the tables' learning rate, so that schedules and rollbacks set it."""
        named = "param_names" in optimizer.param_groups[0]
        handle: Any = (HANDLE, self.tables.handle) if named else self.tables.handle
        optimizer.add_param_group({"params": [handle], **self._group})
        return optimizer

    def kept_rows(
        self, schema: Schema, old_schema: Schema, stored: Mapping[str, StoredTable]
    ) -> tuple[dict[str, Kept], list[str]]:
        """What a warm start keeps of each table, and what starts fresh.

        Args:
            schema: of this run.
            old_schema: of the earlier one.
            stored: tables of the earlier one.

        Raises:
            UserError: the tables are not as the earlier schema says.
        """
        kept, lines = weight_transfer.kept_rows(schema, old_schema)
        sizes = {f.name: (f.rows, f.embedding_dim) for f in old_schema.categorical}
        for name in [name for name in kept if name not in stored]:
            del kept[name]
            lines.append(f"the table of '{name}' is not in the checkpoint")
        for name in kept:
            if (stored[name].rows, stored[name].dim) != sizes[name]:
                there = f"{stored[name].rows:,} x {stored[name].dim}"
                raise UserError(
                    f"warm_start: the table of '{name}' is {there}, and the schema beside it says otherwise"
                )
        return kept, lines

    def other_accumulators(self, stored: Mapping[str, StoredTable], kept: Iterable[str]) -> list[str]:
        """What a warm start cannot take over of the accumulators of some tables as it was, one line each."""
        by_row, used = self.tables.settings.optimizer != "adagrad", [stored[name] for name in kept]
        lines = []
        if none := sum(table.accumulator is None for table in used):
            lines.append(f"accumulators start anew for {none} of {len(used)} tables")
        if other := sum(table.accumulator is not None and table.by_row != by_row for table in used):
            ways = ("one a weight", "one a row")
            lines.append(f"accumulators of {other} tables were {ways[not by_row]} there and are {ways[by_row]} here")
        return lines

    @torch.no_grad()
    def take_over(
        self,
        stored: Mapping[str, StoredTable],
        kept: Mapping[str, Kept],
        changed: Callable[[str, Tensor], Tensor] | None,
    ) -> None:
        """Copies rows of an earlier run into this process's shards, ``BLOCK`` rows at a time.

        Args:
            stored: tables of the earlier run.
            kept: from ``kept_rows``.
            changed: accumulators of some rows as they begin here, given the name of their local weight; None: all of
                them stay at G_0.
        """
        for shard in self.tables.collection.shards:
            if shard.table in kept:
                for here, there in _blocks(kept[shard.table], shard):
                    _copy_rows(stored[shard.table], there, shard, here, changed)

    @torch.no_grad()
    def change_accumulators(self, settings: WarmStartSettings, *, rows: int) -> None:
        """Does at a boundary inside the run what a warm start does to the accumulators.

        Args:
            settings: what happens to them.
            rows: rows that were trained on since the last boundary.
        """
        assert self.journal is not None
        if settings.accumulators not in ("reset", "decay"):
            return
        for number, shard in enumerate(self.tables.collection.shards):
            self.journal.note(number, torch.arange(len(shard.weight)))
            start = self.tables.settings.initial_accumulator_value
            if settings.accumulators == "reset":
                shard.accumulator.fill_(start)
            else:
                shard.accumulator.copy_(accumulators.decayed(shard.accumulator, settings, start=start, rows=rows))

    def use_rate(self, optimizer: Optimizer) -> None:
        """Gives the backward pass that comes next the learning rate of its group."""
        own = next(g for g in optimizer.param_groups if any(p is self.tables.handle for p in g["params"]))
        self.tables.set_learning_rate(float(own["lr"]))

    def mark(self) -> Mark:
        """Makes the tables of now a moment to go back to."""
        assert self.journal is not None
        return self.journal.mark()

    def go_back(self, mark: Mark) -> dict[int, dict[str, Tensor]]:
        """Puts the tables back to where they were at a mark. Returns nothing: no optimizer has state of them."""
        assert self.journal is not None
        self.journal.go_back(mark)
        return {}

    @property
    def widths(self) -> Collection[int]:
        """The widths of the tables."""
        return {table.dim for table in self.tables.tables}

    def rows_at(self, mark: Mark, used: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]] | None:
        """Rows as they were at a mark, from all ranks. All call it.

        Args:
            mark: where.
            used: the rows of each table, in ascending order; the same on all ranks.

        Returns:
            On rank 0 ``weight`` and ``sum`` by width, the rows of all tables of a width in the schema's order.
        """
        assert self.journal is not None
        own = []
        for number, shard in enumerate(self.tables.collection.shards):
            rows = used[shard.table]
            place = ((rows >= shard.row) & (rows < shard.row + len(shard.weight))).nonzero()[:, 0]
            own.append((shard.table, place, shard.column, self.journal.rows_at(mark, number, rows[place] - shard.row)))
        first = dist.get_rank(self._processes) == 0
        every: list[Any] | None = [None] * dist.get_world_size(self._processes) if first else None
        dist.gather_object(own, every, dst=0, group=self._processes)
        if every is None:
            return None
        found: dict[int, dict[str, list[Tensor]]] = {}
        whole = {}
        for table in self.tables.tables:
            whole[table.name] = {name: torch.empty(len(used[table.name]), table.dim) for name in ("weight", "sum")}
            for name, values in whole[table.name].items():
                found.setdefault(table.dim, {}).setdefault(name, []).append(values)
        for name, place, column, values in (part for parts in every for part in parts):
            for key, theirs in (("weight", "weight"), ("sum", "accumulator")):
                whole[name][key][place, column : column + values[theirs].shape[1]] = values[theirs]
        return {dim: {key: torch.cat(parts) for key, parts in tensors.items()} for dim, tensors in found.items()}

    def filled(self, state: TrainingState, found: Mapping[int, Mapping[str, Tensor]], schema: Schema) -> TrainingState:
        """The state of a run with local tables that have the rows of ``rows_at`` alone."""
        assert self._trainer is not None
        module = Fit(self._trainer).module
        return local_state(
            state,
            found,
            schema,
            net=module.net,
            optimizer=self._trainer.optimizers[0],
            factory=module.optimizer_factory,
            lr=module.lr,
        )

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

    def _note(self, number: int, rows: Tensor) -> None:
        if torch.is_grad_enabled():  # a lookup without gradients moves nothing
            assert self.journal is not None
            self.journal.note(number, rows)

    def _tidy(self) -> None:
        """Removes the folders of checkpoints that are gone, and what a killed process left."""
        assert self.folder is not None
        needed = {path.stem for path in (*by_step(self.folder), *by_step(self.folder / BEST))}
        for folder in (self.folder / SHARDS).glob("*"):
            if folder.name not in needed:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.folder / SHARDS).glob(".*.draft"):
            shutil.rmtree(folder, ignore_errors=True)


def _tensors(shard: Shard) -> dict[str, Tensor]:
    return {"weight": shard.weight, "accumulator": shard.accumulator}


def _blocks(kept: Kept, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a shard that a table keeps, counted within the shard, and their rows in the earlier table."""
    first, end = shard.row, shard.row + len(shard.weight)
    if isinstance(kept, int):
        for low in range(first, min(end, kept), BLOCK):
            rows_N = torch.arange(low, min(low + BLOCK, end, kept))
            yield rows_N - first, rows_N
        return
    here, there = kept
    own = (here >= first) & (here < end)
    yield from zip((here[own] - first).split(BLOCK), there[own].split(BLOCK), strict=True)


def _copy_rows(
    table: StoredTable, there: Tensor, shard: Shard, here: Tensor, changed: Callable[[str, Tensor], Tensor] | None
) -> None:
    device, width = shard.weight.device, shard.weight.shape[1]
    place = here.to(device)
    shard.weight.index_copy_(0, place, table.weight.read(there, shard.column, width).to(device))
    if table.accumulator is None or changed is None:
        return
    by_row = shard.accumulator.dim() == 1
    read = table.accumulators_of_rows if by_row else table.accumulator.read
    sums = changed(table.parameter, read(there, shard.column, width))
    shard.accumulator.index_copy_(0, place, sums.to(device))
