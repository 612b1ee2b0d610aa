"""Which rows of large embedding tables have moved since some moment, at the cost of a byte a row."""

from __future__ import annotations

from collections.abc import Mapping
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


def row_state(optimizer: Optimizer, table: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps for each row of a table, by its own names; empty before the first step."""
    state: Mapping[str, Any] = optimizer.state.get(table, {})
    return {key: x for key, x in state.items() if isinstance(x, Tensor) and x.shape == table.shape}


class TouchedRows:
    """Marks the rows of tables that steps move. A step costs time for its own rows alone.

    Args:
        tables: by name.
    """

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self._tables = dict(tables)
        self._marks = {name: torch.zeros(len(x), dtype=torch.bool, device=x.device) for name, x in tables.items()}

    def note_gradients(self) -> None:
        """Marks the rows of the gradients, just before a step. A dense gradient marks every row."""
        for name, table in self._tables.items():
            if table.grad is None:
                continue
            if table.grad.is_sparse:
                self.note(name, table.grad._indices()[0])  # with repetitions: the step adds them up
            else:
                self._marks[name].fill_(True)

    def note(self, name: str, rows: Tensor) -> None:
        """Marks rows of a table."""
        self._marks[name][rows.to(self._marks[name].device)] = True

    def rows(self, name: str) -> Tensor:
        """The marked rows of a table, ascending, on its device."""
        return self._marks[name].nonzero().view(-1)
