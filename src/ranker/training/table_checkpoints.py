"""Checkpoints of models with very large tables: a full copy now and then, and else the rows that have moved since.

    state of a table at a checkpoint = full copy, in which the rows that moved since the copy began are replaced

A full copy is written in a thread while training goes on, and takes no memory. It begins after the first step, and
again once a checkpoint holds more than a share of all rows. It is used by the checkpoints after its end. For a
checkpoint, training waits while the rows that moved since the last checkpoint, and the other tensors, are copied. The
copies are kept in memory until the next full copy is there. A thread joins them and writes the file.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim import Optimizer

from ranker.atomic import replacing
from ranker.capsules.training_state import copied
from ranker.errors import UserError
from ranker.models.admission import admission_of
from ranker.runs.checkpoint_files import full_disk
from ranker.runs.run_folder import STATE_DICT
from ranker.runs.table_files import COPIES, copy_of, note_copy, read_copy, write_copy
from ranker.training.touched_rows import Piece, Rows, TouchedRows, joined_rows, large_tables, row_state

TABLE_ROWS = "table_rows"  # key in a checkpoint: what replaces rows of the full copy
WEIGHT = "weight"


def read_checkpoint(path: Path, *, light: bool = False) -> dict[str, Any]:
    """A checkpoint with its tables. Runs no code from the file; what is not in a full copy is mapped, not read.

    Args:
        path: the file.
        light: leave out the content of tables that are in a full copy: they have their shapes, and zeros.

    Raises:
        UserError: the full copy that it adds to is missing or damaged.
        Exception: any that torch raises for a file that is no checkpoint.
    """
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return completed(saved, path, light=light)


def completed(saved: dict[str, Any], path: Path, *, light: bool = False) -> dict[str, Any]:
    """Puts the tables into what was read from a checkpoint file. Nothing to do for one that holds everything."""
    about = saved.pop(TABLE_ROWS, None)
    if about is None:
        return saved
    full = {} if light else _full_copy(path)
    for name, table in about["tables"].items():
        for key, values in table["tensors"].items():
            if light:
                tensor = torch.zeros((), dtype=values.dtype).expand(table["shape"])
            else:
                tensor = full[f"{name}/{key}"]
                tensor[table["rows"].long()] = values
            if key == WEIGHT:
                saved[STATE_DICT][table["key"]] = tensor
            else:
                saved["optimizer_states"][0]["state"][table["index"]][key] = tensor
    return saved


def _full_copy(path: Path) -> dict[str, Tensor]:
    copy = copy_of(path)
    if copy is None or not copy.is_file():
        raise UserError(f"{path} adds to the full copy {copy}, which is missing; copy the folder {COPIES} with it")
    return read_copy(copy)


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, flushes it to the disk, and renames it.

    Lightning writes to ``TMPDIR`` first and then moves the file. Where that is another file system, as on most
    clusters, the move copies, and a process killed meanwhile leaves half a file under the final name.

    Args:
        rows_above: megabytes of weights and optimizer state from which a table with sparse gradients is saved by its
            touched rows; 0 for never.
        full_share: share of the rows of these tables that a checkpoint may hold before the next full copy begins.
    """

    def __init__(self, *, rows_above: float = 0.0, full_share: float = 0.25) -> None:
        self._rows_above, self._full_share = rows_above, full_share
        self._tables: _Tables | None = None
        self._resumed: tuple[Path, Piece] | None = None  # full copy, and the rows that moved since
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[Path, Future[None]] | None = None

    def watch(self, net: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        """Begins to follow the rows of large tables. Call it in the process that writes, before the first step.

        Args:
            net: the model.
            optimizer: the one that steps it.
            folder: that of the checkpoints.
        """
        large = large_tables(net, self._rows_above)
        self._tables = _Tables(large, net, optimizer, folder / COPIES, self._full_share) if large else None
        if self._tables and self._resumed:
            self._tables.resume(*self._resumed)
        self._resumed = None

    def before_step(self) -> None:
        """Marks the rows that the step is about to move. The gradients are there, reduced over all ranks."""
        if self._tables:
            self._tables.before_step()

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Begins a full copy where there is none, and follows another optimizer."""
        if self._tables:
            self._tables.after_step(optimizer, step)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a file; with large tables it is there after ``settle``.

        Raises:
            UserError: it, or an earlier one, cannot be written, for example because the disk is full. Nothing else has
                changed.
        """
        target = Path(path)
        if self._tables is None:
            _write(checkpoint, target)
            return
        self.settle()
        taken, copy = self._tables.taken(checkpoint)
        self._writing = target, self._pool.submit(_write_rows, taken, target, copy)

    def settle(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            UserError: it cannot be written.
        """
        if self._writing is not None:
            (_, future), self._writing = self._writing, None
            future.result()

    def prune(self, checkpoints: Iterable[Path]) -> None:
        """Removes full copies that none of these checkpoints adds to."""
        if self._tables:
            self._tables.prune(checkpoints)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads a checkpoint with its tables."""
        saved = super().load_checkpoint(path, *args, **options)
        about = saved.get(TABLE_ROWS)
        if about is not None:
            copy = copy_of(Path(path))
            rows = {name: Rows(table["rows"], table["tensors"]) for name, table in about["tables"].items()}
            self._resumed = None if copy is None else (copy, rows)
        return completed(saved, Path(path))


def _write(checkpoint: Mapping[str, Any], target: Path, copy: str = "") -> None:
    try:
        with replacing(target, durable=True) as temporary:
            # To an open file: torch would put the name of the temporary file into the archive.
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
            if copy:
                note_copy(temporary, copy)
    except (OSError, RuntimeError) as error:  # torch wraps the operating system's error
        raise UserError(f"{target} cannot be written: {full_disk(error)}") from error


def _write_rows(checkpoint: dict[str, Any], target: Path, copy: _Copy) -> None:
    for name, rows in copy.joined().items():
        checkpoint[TABLE_ROWS]["tables"][name] |= {"rows": rows.rows, "tensors": rows.tensors}
    _write(checkpoint, target, copy.path.name)


@dataclass
class _Copy:
    """A full copy, and the rows that have moved since it began, as they were at the last checkpoint.

    Attributes:
        path: the file.
        pieces: rows of one or several checkpoints; of a row that is in several the last one counts.
        written: None where the file is on the disk.
    """

    path: Path
    pieces: list[Piece]
    written: Future[None] | None = None

    def joined(self) -> Piece:
        """All pieces as one, which replaces them. For one thread at a time; others may add pieces meanwhile."""
        pieces = list(self.pieces)
        one = {name: joined_rows([piece[name] for piece in pieces]) for name in pieces[0]}
        self.pieces[: len(pieces)] = [one]
        return one


class _Tables:
    """The large tables of a running fit: their full copies, and what a checkpoint holds of them.

    Args:
        tables: by name.
        net: the model.
        optimizer: the one that steps it.
        folder: of the full copies.
        full_share: as of ``DurableCheckpointIO``.
    """

    def __init__(
        self, tables: dict[str, Tensor], net: nn.Module, optimizer: Optimizer, folder: Path, full_share: float
    ) -> None:
        self._tables, self._folder, self._full_share = tables, folder, full_share
        self._pool = ThreadPoolExecutor(1, "tables")
        self._touched = TouchedRows(tables)  # since the last checkpoint
        self._current: _Copy | None = None
        self._coming: _Copy | None = None
        self._wanted = True  # a full copy is to begin after the next step
        self._state: list[Tensor]  # of the optimizer, at the last step
        for module in net.modules():
            if any(module._parameters.get("weight") is table for table in tables.values()):
                module.register_load_state_dict_post_hook(self._invalidate)
        admission = admission_of(net)
        if admission is not None:
            admission.on_count.append(self._note_reset)
        self._follow(optimizer)

    def resume(self, copy: Path, rows: Piece) -> None:
        """Goes on from a full copy that an earlier attempt has written, and the rows that had moved since."""
        if copy.parent != self._folder or rows.keys() != self._tables.keys():
            return
        self._wanted = False
        self._current = _Copy(copy, [dict(rows)])

    def before_step(self) -> None:
        """Marks the rows that the step is about to move."""
        self._touched.note_gradients()

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Follows the optimizer in use, and begins a full copy if one is wanted."""
        if optimizer is not self._optimizer:  # a rollback has replaced it
            self._invalidate()
            self._follow(optimizer)
        state = self._row_states()
        if self._state and not all(map(operator.is_, state, self._state)):  # a boundary has changed all accumulators
            self._invalidate()
        self._state = state
        if self._wanted:
            self._begin(step)

    def taken(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], _Copy]:
        """What the file of a checkpoint holds, copied but for the tables, and the full copy that it adds to.

        Raises:
            UserError: the full copy cannot be written.
        """
        copy = self._usable(int(checkpoint["global_step"]))
        piece = self._moved()
        for each in (self._current, self._coming):
            if each is not None:
                each.pieces.append(piece)
        states = dict(checkpoint[STATE_DICT])
        optimizer = dict(checkpoint["optimizer_states"][0])
        optimizer["state"] = {index: dict(state) for index, state in optimizer["state"].items()}
        order = [id(param) for group in self._optimizer.param_groups for param in group["params"]]
        keys = {value.data_ptr(): key for key, value in states.items() if isinstance(value, Tensor)}
        tables = {}
        for name, table in self._tables.items():
            key, index = keys[table.data_ptr()], order.index(id(table))
            tables[name] = {"key": key, "index": index, "shape": list(table.shape)}
            del states[key]
            for kept in row_state(self._optimizer, table):
                del optimizer["state"][index][kept]
        # What the last checkpoint held: its thread has joined it, so no row counts twice.
        moved = sum(len(rows.rows) for rows in copy.pieces[0].values()) if len(copy.pieces) > 1 else 0
        # It begins after the next step, so that none does at the end of a run.
        self._wanted = self._coming is None and moved > self._full_share * sum(map(len, self._tables.values()))
        rest = {key: value for key, value in checkpoint.items() if key not in (STATE_DICT, "optimizer_states")}
        small = copied({**rest, STATE_DICT: states, "optimizer_states": [optimizer]})
        return {**small, TABLE_ROWS: {"tables": tables}}, copy

    def _moved(self) -> Piece:
        """The rows that moved since the last call, copied."""
        piece = {}
        for name, table in self._tables.items():
            rows = self._touched.taken(name)
            tensors = {WEIGHT: table.detach(), **row_state(self._optimizer, table)}
            values = {key: tensor.index_select(0, rows).cpu() for key, tensor in tensors.items()}
            piece[name] = Rows(rows.to("cpu", torch.int32 if len(table) < 2**31 else torch.int64), values)
        return piece

    def prune(self, checkpoints: Iterable[Path]) -> None:
        """Removes full copies that none of these checkpoints, nor the next one, adds to."""
        used = {copy_of(path) for path in checkpoints}
        used |= {copy.path for copy in (self._current, self._coming) if copy is not None}
        for path in self._folder.glob("from=*.zip"):
            if path not in used:
                path.unlink(missing_ok=True)

    def _follow(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._state = self._row_states()  # a resumed run has one: its first batch may be the first of a window
        optimizer.register_load_state_dict_post_hook(self._invalidate)

    def _row_states(self) -> list[Tensor]:
        return [x for table in self._tables.values() for x in row_state(self._optimizer, table).values()]

    def _note_reset(self, weight: Tensor, rows: Tensor, stale: Tensor) -> None:
        """Marks rows that were forgotten and start anew. They may have no gradient in the step that resets them."""
        for name, table in self._tables.items():
            if table is weight:
                self._touched.note(name, rows[stale])

    def _invalidate(self, *_: Any) -> None:
        """Rows have moved in another way than by a step: neither full copy can be added to."""
        self._current = self._coming = None
        self._wanted = True

    def _begin(self, step: int) -> None:
        path = self._folder / f"from={step}-{secrets.token_hex(4)}.zip"  # no other run's copy has this name
        tensors = {
            f"{name}/{key}": tensor
            for name, table in self._tables.items()
            for key, tensor in {WEIGHT: table.detach(), **row_state(self._optimizer, table)}.items()
        }
        self._wanted = False
        # A piece of the next checkpoint has every row that moved since the last one, and so since now.
        self._coming = _Copy(path, [], self._pool.submit(write_copy, path, tensors))

    def _usable(self, step: int) -> _Copy:
        """The newest full copy that is on the disk; waits for one where there is none.

        Raises:
            UserError: it cannot be written.
        """
        if self._current is None and self._coming is None:
            self._begin(step)
        coming = self._coming
        if coming is not None and coming.written is not None and (self._current is None or coming.written.done()):
            self._coming = None
            try:
                coming.written.result()
            except OSError as error:
                raise UserError(f"{coming.path} cannot be written: {full_disk(error)}") from error
            self._current = _Copy(coming.path, coming.pieces)
        assert self._current is not None
        return self._current
