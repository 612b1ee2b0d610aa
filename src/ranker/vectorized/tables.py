"""The embedding tables of K replicas side by side, of which a step reads and writes the touched rows only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ranker.data.batch import Batch
from ranker.models.embeddings import EmbeddingTables, by_gather

_SUM = "sum"  # the accumulator in the state of an optimizer
_SPARSE = 64  # a table of more rows than so many times the lookups is not marked as a whole


@dataclass(frozen=True)
class _Touched:
    """The rows of one step in the tables of one width.

    Attributes:
        rows_U: rows of the flattened tables [K * rows, D], increasing, so replica after replica.
        ends: where the rows of each replica end.
        weight_UD: these rows, a leaf of the graph of autograd.
        sums_UD: their accumulators.
    """

    rows_U: Tensor
    ends: list[int]
    weight_UD: Tensor
    sums_UD: Tensor


class StackedTables:
    """All tables of K replicas, [K, rows, D] for each width D, with the accumulators of Adagrad.

    A row that no id of a batch names has a gradient of 0. Adagrad without weight decay leaves it and its accumulator
    as they are, to the bit. So a step gathers the touched rows (w, G) into a small dense table, the lookups read that
    one, the optimizer steps it as a dense parameter, and it is written back. A replica on its own fills, reads and
    writes a gradient as large as its tables at every step.

    The parameters of the replicas' own nets become views, and so do the accumulators in their own optimizers. A net can
    be evaluated, and its state saved, between any two steps.

    Memory: 2 K times that of one replica's tables.

    Args:
        nets: the embedding tables of the replicas.
        optimizers: the replicas' own; what they have accumulated is taken over.
        starts: by replica and width, the initial accumulator.
    """

    def __init__(
        self, nets: Sequence[EmbeddingTables], optimizers: Sequence[Optimizer], starts: Sequence[dict[int, float]]
    ) -> None:
        self._net = nets[0]  # for what all replicas have in common
        self.widths = sorted(starts[0])
        self._own = [{dim: _table(net, dim) for dim in self.widths} for net in nets]  # by replica
        self._optimizers = list(optimizers)
        self._weights = {dim: torch.stack([_table(net, dim).detach() for net in nets]) for dim in self.widths}
        self._sums = {dim: torch.empty_like(table) for dim, table in self._weights.items()}
        self._others: list[dict[int, dict[str, Any]]] = []  # what an optimizer keeps of a table beside its accumulator
        for k, (own, optimizer) in enumerate(zip(self._own, self._optimizers, strict=True)):
            states = {dim: dict(optimizer.state.get(table, {})) for dim, table in own.items()}
            for dim, state in states.items():
                self._sums[dim][k] = state.pop(_SUM, starts[k][dim])
            self._others.append(states)
        # An optimizer that has made no step yet has no accumulators.
        self._stepped = any(own[dim] in optimizers[k].state for k, own in enumerate(self._own) for dim in self.widths)
        self._touched: dict[int, _Touched] = {}
        self._show_whole()

    def look_up(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The embeddings as ``Ranker.features`` concatenates them: pieces [K, B, width].

        Args:
            batches: one batch for all replicas, or one each.
        """
        found = {dim: self._look_up(batches, dim) for dim in self.widths}
        return self._net.arranged(found)

    def leaves(self) -> list[Tensor]:
        """The touched rows, whose gradient is wanted, by width."""
        return [self._touched[dim].weight_UD for dim in self.widths]

    def show_touched(self, optimizer: Optimizer, grads: Sequence[Tensor]) -> None:
        """Makes the touched rows the parameters of the replicas, with their gradients and accumulators.

        Args:
            optimizer: the one that steps all replicas; it keeps the accumulator of a parameter as ``sum``.
            grads: gradients of ``leaves``.
        """
        for dim, grad_UD in zip(self.widths, grads, strict=True):
            touched, first = self._touched[dim], 0
            weight_UD = touched.weight_UD.detach()
            for own, others, last in zip(self._own, self._others, touched.ends, strict=True):
                table = own[dim]
                table.data = weight_UD[first:last]
                table.grad = grad_UD[first:last]
                optimizer.state[table] = {**others[dim], _SUM: touched.sums_UD[first:last]}
                first = last

    def write_back(self, optimizer: Optimizer) -> None:
        """Writes what ``show_touched`` showed into the tables, which are the parameters again."""
        for dim, touched in self._touched.items():
            for table, rows in ((self._weights[dim], touched.weight_UD.detach()), (self._sums[dim], touched.sums_UD)):
                table.view(-1, dim).index_copy_(0, touched.rows_U, rows)
        for own, others in zip(self._own, self._others, strict=True):
            for dim, table in own.items():
                table.grad = None
                others[dim] = {name: x for name, x in optimizer.state.pop(table).items() if name != _SUM}
        self._touched, self._stepped = {}, True
        self._show_whole()

    def keep(self, replicas: Sequence[int]) -> None:
        """Drops the other replicas, whose nets keep their tables."""
        chosen = torch.tensor(replicas)
        for k, (own, optimizer) in enumerate(zip(self._own, self._optimizers, strict=True)):
            if k not in replicas:
                for table in own.values():
                    table.data = table.data.clone()
                    if self._stepped:
                        optimizer.state[table][_SUM] = optimizer.state[table][_SUM].clone()
        self._weights = {dim: table.index_select(0, chosen) for dim, table in self._weights.items()}
        self._sums = {dim: table.index_select(0, chosen) for dim, table in self._sums.items()}
        self._own, self._others = [self._own[k] for k in replicas], [self._others[k] for k in replicas]
        self._optimizers = [self._optimizers[k] for k in replicas]
        self._show_whole()

    def _show_whole(self) -> None:
        for k, (own, optimizer) in enumerate(zip(self._own, self._optimizers, strict=True)):
            for dim, table in own.items():
                table.data = self._weights[dim][k]
                if self._stepped:
                    optimizer.state[table] = {_SUM: self._sums[dim][k], **self._others[k][dim]}

    def _look_up(self, batches: Sequence[Batch], dim: int) -> tuple[Tensor, Tensor]:
        """One-hot [K, B, C * D] and ragged [K, R, B, D] embeddings of one width."""
        count, table_rows = self._weights[dim].shape[:2]
        parts = [self._net.places(batch, dim) for batch in batches]
        each = [_compact(torch.cat([rows.reshape(-1), values]), table_rows) for rows, values, _ in parts]
        if len(parts) == 1:
            parts, each = parts * count, each * count
        ends = torch.tensor([len(rows_U) for rows_U, _ in each]).cumsum(0).tolist()
        firsts = [0, *ends[:-1]]
        rows_U = torch.cat([rows + k * table_rows for k, (rows, _) in enumerate(each)])
        flat = self._weights[dim].view(-1, dim), self._sums[dim].view(-1, dim)
        weight_UD, sums_UD = (table.index_select(0, rows_U) for table in flat)
        self._touched[dim] = _Touched(rows_U, ends, weight_UD.requires_grad_(), sums_UD)

        (batch_rows, columns), offsets, taken = parts[0][0].shape, [parts[0][2][:1]], 0
        one_hot, values = [], []
        for first, (_, place), (rows, ids, bounds) in zip(firsts, each, parts, strict=True):
            place = place + first
            one_hot.append(place[: rows.numel()])
            values.append(place[rows.numel() :])
            offsets.append(bounds[1:] + taken)
            taken += len(ids)
        found, bags = by_gather(
            weight_UD,
            torch.cat(one_hot).view(count * batch_rows, columns),
            torch.cat(values),
            torch.cat(offsets),
            sparse=False,
        )
        lists = (len(offsets[1]) // batch_rows if batch_rows else 0, batch_rows, dim)
        return found.view(count, batch_rows, columns * dim), bags.view(count, *lists)


def _table(net: EmbeddingTables, dim: int) -> Tensor:
    return net.tables.get_parameter(f"dim_{dim}.weight")


def _compact(ids_M: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The rows that are named, increasing, and the place of each id among them."""
    if rows > _SPARSE * len(ids_M):
        found, place = torch.unique(ids_M, return_inverse=True)
        return found, place
    # Marking a table of this size is several times as fast as sorting the ids.
    named = torch.zeros(rows, dtype=torch.bool)
    named[ids_M] = True
    return named.nonzero().squeeze(1), named.cumsum(0).sub_(1).index_select(0, ids_M)
