"""Large local tables in a run: going back, and reading rows of an earlier step, without a copy of any table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ranker.capsules.training_state import TrainingState
from ranker.data.schema import Schema
from ranker.models.admission import admission_of
from ranker.models.embeddings import EmbeddingTables, place
from ranker.training.fit import Fit
from ranker.training.row_journal import Mark, RowJournal
from ranker.training.touched_rows import gradient_rows, large_tables, row_state

WEIGHT, SEEN, LAST = "weight", "seen", "last"
OF_NET = {
    WEIGHT: "embeddings.tables.dim_{}.weight",
    SEEN: "embeddings.admission.seen_{}",
    LAST: "embeddings.admission.last_{}",
}
"""What the net has for each row of the tables of a width, and its name in the state of the net."""


class LargeTables:
    """Tables with sparse gradients, of which snapshots keep touched rows; ``RowJournal`` says what that takes.

    A row has its weights, what the optimizer keeps for it (of whatever optimizer is in use), and what ``admission``
    has seen of it.

    Args:
        fit: the running fit.
        tables: the weights by their names in the net.
    """

    def __init__(self, fit: Fit, tables: Mapping[str, Tensor]) -> None:
        self._trainer, self._net = fit.trainer, fit.module.net
        self._schema = fit.module.schema
        self._tables = dict(tables)
        self._buffers = dict(self._net.named_buffers())
        self._journal = RowJournal(
            [partial(self._tensors, table) for table in tables.values()], [len(table) for table in tables.values()]
        )
        admission = admission_of(self._net)
        if admission is not None:
            admission.on_count.append(self._note)

    @classmethod
    def of(cls, fit: Fit, megabytes: float) -> LargeTables | None:
        """Those of a fit that take more than some memory, as ``touched_rows.large_tables``; None where none does."""
        net = fit.module.net
        if fit.module.device_mesh is not None or not isinstance(getattr(net, "embeddings", None), EmbeddingTables):
            return None
        found = {name: x for name, x in large_tables(net, megabytes).items() if name.startswith("embeddings.tables.")}
        return cls(fit, found) if found else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tables with one value of the optimizer's state for each weight."""
        return 2 * sum(table.nbytes for table in self._tables.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes that are kept to go back."""
        return self._journal.nbytes

    @property
    def widths(self) -> Collection[int]:
        """The widths of the tables: all tables of a width are one weight."""
        return [table.shape[1] for table in self._tables.values()]

    def before_step(self) -> None:
        """Keeps the rows that the step is about to move. The gradients are there, reduced over all ranks."""
        for number, table in enumerate(self._tables.values()):
            rows = gradient_rows(table)
            if rows is not None:
                self._journal.note(number, rows)

    def mark(self) -> Mark:
        """Makes the tables of now a moment to go back to."""
        return self._journal.mark()

    def rest(self) -> dict[str, dict[str, Any]]:
        """The state of the net and of the optimizer without the rows of the tables; nothing is copied."""
        net, optimizer = self._net.state_dict(), self._optimizer.state_dict()
        states = {index: dict(state) for index, state in optimizer["state"].items()}
        for table in self._tables.values():
            for name in OF_NET.values():
                net.pop(name.format(table.shape[1]), None)
            for key in row_state(self._optimizer, table):
                del states[self._index(table, self._optimizer)][key]
        return {"net": net, "optimizer": {**optimizer, "state": states}}

    def go_back(self, mark: Mark) -> dict[int, dict[str, Tensor]]:
        """Puts the rows back to where they were at a mark.

        Returns:
            What the optimizer had for all rows there, by the number of the parameter. These are the tensors that step,
            for ``Optimizer.load_state_dict``.
        """
        return self._state(self._journal.go_back(mark), self._optimizer)

    def put_back_state(self, mark: Mark, optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
        """Gives what the optimizer has for each row its values at a mark; the weights stay.

        Args:
            mark: where.
            optimizer: one such as that of the mark, whose parameters are numbered in what is returned.

        Returns:
            As ``go_back``.
        """
        return self._state(self._journal.put_back(mark, without=OF_NET), optimizer)

    def rows_at(self, mark: Mark, used: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]] | None:
        """Rows as they were at a mark.

        Args:
            mark: where.
            used: the rows of each table, by the feature that owns it, in ascending order.

        Returns:
            Their tensors by width and name, the rows of all tables of a width one after another in the schema's order.
            None on all ranks but the first, which has the same rows.
        """
        if not self._trainer.is_global_zero:
            return None
        first, _ = place(self._schema)
        found = {}
        for number, table in enumerate(self._tables.values()):
            dim = table.shape[1]
            owners = [f.name for f in self._schema.categorical if not f.table and f.embedding_dim == dim]
            rows = torch.cat([used[name] + first[name] for name in owners])
            found[dim] = self._journal.rows_at(mark, number, rows)
        return found

    def filled(self, state: TrainingState, found: Mapping[int, Mapping[str, Tensor]], _schema: Schema) -> TrainingState:
        """A state whose tables have the rows of ``rows_at`` alone."""
        net, states = dict(state.net), {index: dict(kept) for index, kept in state.optimizer["state"].items()}
        for table in self._tables.values():
            dim = table.shape[1]
            net |= {OF_NET[name].format(dim): x for name, x in found[dim].items() if name in OF_NET}
            kept = {name: x for name, x in found[dim].items() if name not in OF_NET}
            if kept:
                states.setdefault(self._index(table, self._optimizer), {}).update(kept)
        return replace(state, net=net, optimizer={**state.optimizer, "state": states}, mark=None)

    @property
    def _optimizer(self) -> Optimizer:
        return self._trainer.optimizers[0]  # a rollback may have replaced it

    def _tensors(self, table: Tensor) -> dict[str, Tensor]:
        counts = {name: self._buffers.get(OF_NET[name].format(table.shape[1])) for name in (SEEN, LAST)}
        return {
            WEIGHT: table,
            **row_state(self._optimizer, table),
            **{name: x for name, x in counts.items() if x is not None},
        }

    def _note(self, weight: Tensor, rows: Tensor, _stale: Tensor) -> None:
        for number, table in enumerate(self._tables.values()):
            if table is weight:
                self._journal.note(number, rows)

    @staticmethod
    def _index(table: Tensor, optimizer: Optimizer) -> int:
        order = [param for group in optimizer.param_groups for param in group["params"]]
        return next(index for index, param in enumerate(order) if param is table)

    def _state(self, found: list[dict[str, Tensor]], optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
        states = {}
        for table, tensors in zip(self._tables.values(), found, strict=True):
            kept = {name: x for name, x in tensors.items() if name not in OF_NET}
            if kept:
                states[self._index(table, optimizer)] = kept
        return states
