"""Embedding tables of all categorical features, looked up in a few kernel calls however many features there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import CategoricalFeature, Schema
from ranker.errors import UserError
from ranker.models.lookup import by_bag, by_gather

INIT_RANGE = 0.05


@dataclass(frozen=True)
class _Run:
    """Neighbouring output columns that come from one place: one-hot features ``first .. last-1``, or a ragged one."""

    one_hot: bool
    dim: int
    first: int
    last: int


class EmbeddingTables(nn.Module):
    """One weight per embedding width, holding every table of that width one below the other.

        e_f = W_D[start_f + id_f]                     one-hot feature f
        e_f = mean over i of W_D[start_f + id_f,i]    multi-hot or sequence; an empty list gives 0

    With a weight a feature, 45 features cost 45 lookups forward and 45 scatters backward, and on small batches
    the calls cost more than the work. Fused, all one-hot features of a width are one lookup and all ragged ones
    one bag. Adagrad acts on each coordinate alone, so the tables train exactly as separate ones would; a method
    that measures a whole tensor (Clippy, clipping by norm) would see all tables of a width as one.

    Weights start uniform in [-0.05, 0.05], the default of a Keras embedding: the paper names no initialiser and
    its authors work in Keras. It keeps a row that is seen for the first time from outweighing trained ones.

    Args:
        schema: names the features; the output has their embeddings side by side, in the schema's order.
        sparse: give sparse gradients, which hold the touched rows alone. Worth it for tables far larger than a batch.

    Source: Keras ``Embedding(embeddings_initializer="uniform")``.
    """

    def __init__(self, schema: Schema, *, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse
        self.output_width = sum(f.embedding_dim for f in schema.categorical)
        self._ragged_names: dict[int, list[str]] = {}
        self._ragged_starts: dict[int, list[int]] = {}
        self._features = schema.categorical

        start, rows = _place(schema)
        self._limits = {f.name: schema.table_of(f).rows for f in schema.categorical}
        # Modules rather than bare parameters: DDP asks an nn.Embedding whether its gradient is sparse.
        self.tables = nn.ModuleDict(
            {
                f"dim_{dim}": nn.Embedding.from_pretrained(torch.empty(n, dim), freeze=False, sparse=sparse)
                for dim, n in sorted(rows.items())
            }
        )
        for dim in rows:
            columns = [c for c, f in enumerate(schema.one_hot) if f.embedding_dim == dim]
            starts = [start[schema.table_of(schema.one_hot[c]).name] for c in columns]
            every = len(columns) == len(schema.one_hot)
            # Not in the checkpoint: the schema says it all.
            self.register_buffer(f"columns_{dim}", None if every else torch.tensor(columns), persistent=False)
            self.register_buffer(f"starts_{dim}", torch.tensor(starts, dtype=torch.int64), persistent=False)
            ragged = [f for f in schema.ragged if f.embedding_dim == dim]
            self._ragged_names[dim] = [f.name for f in ragged]
            self._ragged_starts[dim] = [start[schema.table_of(f).name] for f in ragged]
        self._runs = _runs(schema)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every row anew."""
        for weight in self.tables.parameters():
            nn.init.uniform_(weight, -INIT_RANGE, INIT_RANGE)

    def forward(self, batch: Batch) -> Tensor:
        """Embeddings of all features side by side, x_BD with D the sum of the embedding widths."""
        pieces = self.pieces(batch)
        if not pieces:
            return batch.dense_BF.new_zeros(batch.dense_BF.shape[0], 0)
        return torch.cat(pieces, dim=1)

    def pieces(self, batch: Batch) -> list[Tensor]:
        """The output in as few pieces as its order allows, for a caller that joins more beside them in one copy."""
        found = {dim: self._look_up(batch, dim) for dim in self._ragged_names}
        pieces = []
        for run in self._runs:
            one_hot, bags = found[run.dim]
            pieces.append(one_hot[:, run.first * run.dim : run.last * run.dim] if run.one_hot else bags[run.first])
        return pieces

    def check(self, batch: Batch) -> None:
        """Looks for ids outside of a feature's own table. They would silently read another feature's rows.

        Waits for the device: meant for the first batch of a run, not for every one.

        Raises:
            UserError: an id is negative or not below the rows of its table.
        """
        for position, feature in enumerate(f for f in self._features if f.kind == "one_hot"):
            self._check(feature, batch.onehot_BC[:, position])
        for feature in self._features:
            if feature.kind != "one_hot":
                self._check(feature, batch.ragged[feature.name].values)

    def _check(self, feature: CategoricalFeature, ids: Tensor) -> None:
        rows = self._limits[feature.name]
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
            raise UserError(
                f"feature '{feature.name}': embedding rows run from {int(ids.min())} to {int(ids.max())}, "
                f"its table has rows 0 to {rows - 1}; raise its num_embeddings or prepare the data with this schema"
            )

    def _look_up(self, batch: Batch, dim: int) -> tuple[Tensor, Tensor]:
        """Features of one width: one-hot ones [B, C_D * D], ragged ones [R_D, B, D]."""
        weight = self.tables.get_parameter(f"dim_{dim}.weight")
        rows_BC = self._one_hot_rows(batch, dim)
        values_N, offsets = self._ragged_rows(batch, dim)
        look_up = by_gather if weight.device.type == "cpu" else by_bag
        one_hot, bags = look_up(weight, rows_BC, values_N, offsets, sparse=self.sparse)
        # Sizes are read from shapes: len() of a tensor would fix them in an exported program.
        rows = rows_BC.shape[0]
        return one_hot.view(rows, rows_BC.shape[1] * dim), bags.view(len(self._ragged_names[dim]), rows, dim)

    def _one_hot_rows(self, batch: Batch, dim: int) -> Tensor:
        """Rows within the weight, [B, C_D]."""
        columns = self._buffers[f"columns_{dim}"]
        ids_BC = batch.onehot_BC if columns is None else batch.onehot_BC.index_select(1, columns)
        return ids_BC + self.get_buffer(f"starts_{dim}")

    def _ragged_rows(self, batch: Batch, dim: int) -> tuple[Tensor, Tensor]:
        """Rows within the weight, [N], and where each list starts, [R_D * B + 1]: all features' lists in one row."""
        lists = [batch.ragged[name] for name in self._ragged_names[dim]]
        if not lists:
            return batch.onehot_BC.new_empty(0), batch.onehot_BC.new_zeros(1)
        offsets, end = [lists[0].offsets[:1]], 0
        for part in lists:
            offsets.append(part.offsets[1:] + end)
            end += part.values.shape[0]
        values = [part.values + start for part, start in zip(lists, self._ragged_starts[dim], strict=True)]
        return torch.cat(values), torch.cat(offsets)

    def extra_repr(self) -> str:
        """Shows the layout when the module is printed."""
        return f"features={len(self._features)}, output_width={self.output_width}, sparse={self.sparse}"


def _place(schema: Schema) -> tuple[dict[str, int], dict[int, int]]:
    """First row of each table within the weight of its width, and the rows of each weight."""
    start: dict[str, int] = {}
    rows: dict[int, int] = {}
    for feature in schema.categorical:
        if not feature.table:
            start[feature.name] = rows.get(feature.embedding_dim, 0)
            rows[feature.embedding_dim] = start[feature.name] + feature.rows
    return start, rows


def _runs(schema: Schema) -> list[_Run]:
    """The schema's order as few pieces: one-hot neighbours of a width lie side by side already."""
    runs: list[_Run] = []
    seen: dict[tuple[bool, int], int] = {}
    for feature in schema.categorical:
        key = (feature.kind == "one_hot", feature.embedding_dim)
        place = seen.get(key, 0)
        seen[key] = place + 1
        if runs and key[0] and (runs[-1].one_hot, runs[-1].dim, runs[-1].last) == (*key, place):
            runs[-1] = _Run(True, key[1], runs[-1].first, place + 1)
        else:
            runs.append(_Run(*key, place, place + 1))
    return runs
