"""Which rows of large embedding tables have moved since some moment, at the cost of a byte a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def sparse_tables(net: nn.Module) -> dict[str, Tensor]:
    """The weights whose gradients hold touched rows only, by name."""
    return {
        f"{name}.weight": module.weight
        for name, module in net.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    }


def large_tables(net: nn.Module, megabytes: float) -> dict[str, Tensor]:
    """The tables with sparse gradients that take more than some memory with their accumulators, by name.

    Args:
        net: the model.
        megabytes: the limit, of weights and one value of the optimizer's state for each, as Adagrad has it; 0: none.
    """
    return {name: x for name, x in sparse_tables(net).items() if megabytes and 2 * x.nbytes > 2**20 * megabytes}


def gradient_rows(table: Tensor) -> Tensor | None:
    """The rows that the next step moves, with repetitions; all of them with a dense gradient, None without one."""
    if table.grad is None:
        return None
    if table.grad.is_sparse:
        return table.grad._indices()[0]
    return torch.arange(len(table), device=table.device)


def row_state(optimizer: Optimizer, table: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps for each row of a table, by its own names; empty before the first step."""
    state: Mapping[str, Any] = optimizer.state.get(table, {})
    return {key: x for key, x in state.items() if isinstance(x, Tensor) and x.shape == table.shape}


@dataclass(frozen=True)
class Rows:
    """Rows of a table at some moment, on the CPU.

    Attributes:
        rows: their numbers [N]; a row may occur twice, with the same values.
        tensors: weights and state of the optimizer by name, each [N, D].
    """

    rows: Tensor
    tensors: dict[str, Tensor]


Piece = dict[str, Rows]
"""Rows of several tables, by the tables' names."""


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of several moments, in the order of their numbers; of a row that is in several parts, the last one."""
    rows = torch.cat([part.rows for part in parts])
    order = torch.argsort(rows, stable=True)
    found = rows[order]
    last = torch.ones(len(found), dtype=torch.bool)
    last[:-1] = found[1:] != found[:-1]
    kept = order[last]
    tensors = {key: torch.cat([part.tensors[key] for part in parts])[kept] for key in parts[0].tensors}
    return Rows(rows[kept], tensors)


_SCAN = 64  # reading the marks of this many rows takes about as long as gathering one row


class TouchedRows:
    """Collects the rows of tables that steps move, each once. A step costs time for its own rows alone.

    Args:
        tables: by name.
    """

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self._tables = dict(tables)
        self._marks = {name: torch.zeros(len(x), dtype=torch.bool, device=x.device) for name, x in tables.items()}
        self._found: dict[str, list[Tensor]] = {name: [] for name in tables}

    def note_gradients(self) -> None:
        """Adds the rows of the gradients, just before a step."""
        for name, table in self._tables.items():
            rows = gradient_rows(table)
            if rows is not None:
                self.note(name, rows)

    def note(self, name: str, rows: Tensor) -> None:
        """Adds rows of a table."""
        marks = self._marks[name]
        new = rows[~marks[rows]]
        marks[new] = True
        self._found[name].append(new)

    def taken(self, name: str) -> Tensor:
        """The rows that were added since the last call, on the table's device; those of one step may repeat."""
        found, self._found[name] = self._found[name], []
        marks = self._marks[name]
        if sum(map(len, found)) > len(marks) // _SCAN:
            # In ascending order, in which rows are gathered in half the time.
            rows = marks.nonzero().squeeze(1)
            marks.zero_()
            return rows
        rows = torch.cat(found) if found else marks.new_zeros(0, dtype=torch.int64)
        marks[rows] = False
        return rows
