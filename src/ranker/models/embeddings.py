"""Embedding tables of all categorical features, and their lookup in a few kernel calls for any number of features."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.models.admission import INIT_RANGE, Admission, has_rule

_NARROW = 8
"""Maximum width of rows that are added element by element. 36,864 rows of 8: 0.20 ms instead of 0.54. Of 16: 0.35
instead of 0.29."""


@dataclass(frozen=True)
class _Run:
    """Adjacent output columns from one source: the one-hot features ``first .. last-1``, or one ragged feature."""

    one_hot: bool
    dim: int
    first: int
    last: int


class Tables(nn.Module, ABC):
    """The tables of a model, wherever their rows are.

    Attributes:
        output_width: sum of the embedding widths of all features.
    """

    output_width: int

    def forward(self, batch: Batch) -> Tensor:
        """Embeddings of all features side by side, x_BD with D the sum of the embedding widths."""
        pieces = self.pieces(batch)
        if not pieces:
            return batch.dense_BF.new_zeros(batch.dense_BF.shape[0], 0)
        return torch.cat(pieces, dim=1)

    @abstractmethod
    def pieces(self, batch: Batch) -> list[Tensor]:
        """The output in as few pieces as its order allows, for a caller that concatenates it with other tensors."""

    @abstractmethod
    def count(self) -> int:
        """Number of weights of all tables, over all processes."""


class EmbeddingTables(Tables):
    """One weight per embedding width. It contains all tables of that width, concatenated.

        e_f = W_D[start_f + id_f]                     one-hot feature f
        e_f = mean over i of W_D[start_f + id_f,i]    multi-hot or sequence; an empty list gives 0

    With one weight per feature, 45 features cost 45 lookups forward and 45 scatters backward, and on small batches
    the calls cost more than the work. Fused, all one-hot features of a width are one lookup and all ragged features
    one bag. Adagrad acts on each coordinate alone, so the tables train exactly as separate ones. A per-tensor method
    (Clippy, clipping by norm) sees all tables of a width as one tensor.

    Initial weights are uniform in [-0.05, 0.05], the default of a Keras embedding. The paper names no initialiser and
    its authors work in Keras. With this range, a row seen for the first time does not outweigh trained rows.

    A table with ``admit_after`` or ``evict_after_days`` counts its rows, see :mod:`ranker.models.admission`.

    Args:
        schema: gives the features. The output has their embeddings side by side, in the schema's order.
        sparse: use sparse gradients, which contain only the rows used. Useful for tables far larger than a batch.

    Source: Keras ``Embedding(embeddings_initializer="uniform")``.
    """

    def __init__(self, schema: Schema, *, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse
        self.output_width = sum(f.embedding_dim for f in schema.categorical)
        self._ragged_names: dict[int, list[str]] = {}
        self._ragged_starts: dict[int, list[int]] = {}

        start, rows = place(schema)
        _check_memory(schema)
        # Modules instead of parameters, because DDP reads from nn.Embedding whether its gradient is sparse.
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
            # Not in the checkpoint, because the schema determines it.
            self.register_buffer(f"columns_{dim}", None if every else torch.tensor(columns), persistent=False)
            self.register_buffer(f"starts_{dim}", torch.tensor(starts, dtype=torch.int64), persistent=False)
            ragged = [f for f in schema.ragged if f.embedding_dim == dim]
            self._ragged_names[dim] = [f.name for f in ragged]
            self._ragged_starts[dim] = [start[schema.table_of(f).name] for f in ragged]
        self._runs = _runs(schema)
        self.admission = Admission(schema, start) if any(map(has_rule, schema.categorical)) else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all rows again."""
        for weight in self.tables.parameters():
            nn.init.uniform_(weight, -INIT_RANGE, INIT_RANGE)

    def count(self) -> int:
        """As in ``Tables``."""
        return sum(weight.numel() for weight in self.tables.parameters())

    def pieces(self, batch: Batch) -> list[Tensor]:
        """As in ``Tables``."""
        return self.arranged({dim: self._look_up(batch, dim) for dim in self._ragged_names})

    def arranged(self, found: Mapping[int, tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The embeddings of all widths as pieces in the schema's order.

        Args:
            found: by width D: one-hot [..., B, C_D * D], ragged [..., R_D, B, D].
        """
        pieces = []
        for run in self._runs:
            one_hot, bags = found[run.dim]
            columns = slice(run.first * run.dim, run.last * run.dim)
            pieces.append(one_hot[..., columns] if run.one_hot else bags.select(-3, run.first))
        return pieces

    def rows_of(self, batch: Batch, dim: int, columns: list[int], lists: list[str]) -> Tensor:
        """The rows of some features' ids, admitted or not, one after another, int64 [N].

        Args:
            batch: the ids.
            dim: width of the features.
            columns: places of one-hot features among those of this width.
            lists: names of features with lists.
        """
        starts = dict(zip(self._ragged_names[dim], self._ragged_starts[dim], strict=True))
        one_hot = self._one_hot_rows(batch, dim)[:, columns].reshape(-1)
        return torch.cat([one_hot, *(batch.ragged[name].values + starts[name] for name in lists)])

    def places(self, batch: Batch, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that a batch reads of the weight of one width, as ``by_gather`` takes them.

        Returns:
            One-hot rows [B, C_D]; rows of all lists [N]; offsets of the lists, [R_D * B + 1].
        """
        rows_BC = self._one_hot_rows(batch, dim)
        if self.admission is not None:
            rows_BC = self.admission.one_hot(rows_BC, self.get_buffer(f"starts_{dim}"), dim)
        return (rows_BC, *self._ragged_rows(batch, dim))

    def _look_up(self, batch: Batch, dim: int) -> tuple[Tensor, Tensor]:
        """Embeddings of the features of one width: one-hot [B, C_D * D], ragged [R_D, B, D]."""
        weight = self.tables.get_parameter(f"dim_{dim}.weight")
        rows_BC, values_N, offsets = self.places(batch, dim)
        look_up = by_gather if weight.device.type == "cpu" else by_bag
        one_hot, bags = look_up(weight, rows_BC, values_N, offsets, sparse=self.sparse)
        # Sizes come from shapes, because len() of a tensor would be a constant in an exported program.
        rows = rows_BC.shape[0]
        return one_hot.view(rows, rows_BC.shape[1] * dim), bags.view(len(self._ragged_names[dim]), rows, dim)

    def _one_hot_rows(self, batch: Batch, dim: int) -> Tensor:
        """Rows within the weight, [B, C_D]."""
        columns: Tensor | None = getattr(self, f"columns_{dim}")
        ids_BC = batch.onehot_BC if columns is None else batch.onehot_BC.index_select(1, columns)
        return ids_BC + self.get_buffer(f"starts_{dim}")

    def _ragged_rows(self, batch: Batch, dim: int) -> tuple[Tensor, Tensor]:
        """Rows within the weight, [N], and offsets, [R_D * B + 1], of the lists of all features, concatenated."""
        lists = [batch.ragged[name] for name in self._ragged_names[dim]]
        if not lists:
            return batch.onehot_BC.new_empty(0), batch.onehot_BC.new_zeros(1)
        offsets, end = [lists[0].offsets[:1]], 0
        for part in lists:
            offsets.append(part.offsets[1:] + end)
            end += part.values.shape[0]
        values = [part.values + start for part, start in zip(lists, self._ragged_starts[dim], strict=True)]
        if self.admission is not None:
            places = zip(values, self._ragged_starts[dim], self._ragged_names[dim], strict=True)
            values = [self.admission.ragged(rows, start, name, dim) for rows, start, name in places]
        return torch.cat(values), torch.cat(offsets)


_MAKE: ContextVar[Callable[[Schema], Tables] | None] = ContextVar("_MAKE", default=None)


@contextmanager
def tables_made_by(make: Callable[[Schema], Tables]) -> Iterator[None]:
    """Models that are built in this block get their tables from ``make``; no model needs an argument for it."""
    token = _MAKE.set(make)
    try:
        yield
    finally:
        _MAKE.reset(token)


def new_tables(schema: Schema, *, sparse: bool) -> Tables:
    """The tables of a new model: those of ``tables_made_by``, or all of them in this process.

    Raises:
        UserError: the tables are others than ``EmbeddingTables``, and a feature has a rule of ``admission``.
    """
    make = _MAKE.get()
    ruled = [feature.name for feature in schema.categorical if has_rule(feature)]
    if make is not None and ruled:
        raise UserError(
            f"categorical feature '{ruled[0]}': admit_after and evict_after_days need embeddings=local; leave them out "
            "for sharded tables"
        )
    return EmbeddingTables(schema, sparse=sparse) if make is None else make(schema)


def _check_memory(schema: Schema) -> None:
    """Refuses tables that cannot fit, before the system kills the process for them."""
    sizes = {f.name: 4 * f.rows * f.embedding_dim for f in schema.categorical}
    needed, there = sum(sizes.values()), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"schema '{schema.name}': the embedding tables need {needed / 2**30:,.0f} GiB, this machine has "
            f"{there / 2**30:,.0f}; the largest is that of '{largest}' ({sizes[largest] / 2**30:,.0f} GiB): lower its "
            "num_embeddings or hash_buckets, or its embedding_dim"
        )


def place(schema: Schema) -> tuple[dict[str, int], dict[int, int]]:
    """First row of each table within the weight of its width, and the rows of each weight."""
    start: dict[str, int] = {}
    rows: dict[int, int] = {}
    for feature in schema.categorical:
        if not feature.table:
            start[feature.name] = rows.get(feature.embedding_dim, 0)
            rows[feature.embedding_dim] = start[feature.name] + feature.rows
    return start, rows


def _runs(schema: Schema) -> list[_Run]:
    """The schema's order in few pieces: adjacent one-hot features of a width are one piece."""
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


def by_bag(
    weight: Tensor, rows_BC: Tensor, values_N: Tensor, offsets: Tensor, *, sparse: bool
) -> tuple[Tensor, Tensor]:
    """Lookup with torch's embedding kernels, whose gradients on a GPU are deterministic.

    Returns:
        The rows, [B, C, D], and the mean of each list, [lists, D], 0 for an empty list.
    """
    one_hot = F.embedding(rows_BC, weight, sparse=sparse)
    return one_hot, F.embedding_bag(values_N, weight, offsets, mode="mean", sparse=sparse, include_last_offset=True)


def by_gather(
    weight: Tensor, rows_BC: Tensor, values_N: Tensor, offsets: Tensor, *, sparse: bool
) -> tuple[Tensor, Tensor]:
    """The same lookup as ``by_bag``, for the CPU.

    On the CPU the backward passes of the embedding kernels take several times as long as ``index_add``, and each of the
    two would fill a gradient as large as the table.
    """
    if not sparse and not torch.compiler.is_compiling():
        one_hot, means = _RowsAndMeans.apply(weight, rows_BC.reshape(-1), values_N, offsets)
        return one_hot.view(*rows_BC.shape, weight.shape[1]), means
    every = torch.cat([rows_BC.view(-1), values_N])
    found = F.embedding(every, weight, sparse=True) if sparse else weight.index_select(0, every)
    one_hot, items_ND = found.split([rows_BC.numel(), values_N.shape[0]])
    sums = items_ND.new_zeros(offsets.shape[0] - 1, items_ND.shape[1]).index_add(
        0, _owners(offsets, values_N), items_ND
    )
    return one_hot.view(*rows_BC.shape, weight.shape[1]), sums / _sizes(offsets)


class _RowsAndMeans(torch.autograd.Function):
    """Rows and list means with torch's embedding_bag, which never stores the lists' rows, and a custom backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows_M: Tensor, values_N: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows_M, values_N, offsets)
        ctx.shape = weight.shape
        rows_MD = weight.index_select(0, rows_M)
        if not values_N.shape[0]:
            return rows_MD, weight.new_zeros(offsets.shape[0] - 1, weight.shape[1])
        return rows_MD, F.embedding_bag(values_N, weight, offsets, mode="mean", include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows_M, values_N, offsets), (grad_MD, grad_LD) = ctx.saved_tensors, grads
        items_ND = (grad_LD / _sizes(offsets)).index_select(0, _owners(offsets, values_N))
        zeros = grad_MD.new_zeros(ctx.shape)
        if torch.is_grad_enabled():  # for second derivatives
            return zeros.index_add(0, rows_M, grad_MD).index_add(0, values_N, items_ND), None, None, None
        return _add_rows(_add_rows(zeros, rows_M, grad_MD), values_N, items_ND), None, None, None


def _add_rows(table: Tensor, rows_N: Tensor, values_ND: Tensor) -> Tensor:
    """``table.index_add_(0, rows_N, values_ND)``, in the order of the rows.

    On the CPU torch first sorts the rows of a matrix, which takes longer than adding narrow rows. To a flat tensor it
    adds element by element in the given order. Viewed as complex numbers, it adds two at a time.
    """
    dim = table.shape[1]
    if dim % 2 or dim > _NARROW or table.dtype != torch.float32 or not table.is_contiguous():
        return table.index_add_(0, rows_N, values_ND)
    pairs = dim // 2
    place_NP = rows_N.unsqueeze(1) * pairs + torch.arange(pairs)
    added = values_ND.contiguous()
    if added.storage_offset() % 2:  # possible for a batch of one row; complex numbers need an even offset
        added = added.clone()
    flat, added = (torch.view_as_complex(x.view(-1, 2)) for x in (table, added))
    flat.scatter_add_(0, place_NP.view(-1), added)
    return table


def _owners(offsets: Tensor, values_N: Tensor) -> Tensor:
    """The list of each value, int64 [N]."""
    lengths = offsets.diff()
    lists = torch.arange(lengths.shape[0], device=offsets.device)
    return torch.repeat_interleave(lists, lengths, output_size=values_N.shape[0])


def _sizes(offsets: Tensor) -> Tensor:
    """The divisor of each list's sum, [lists, 1]. 1 for an empty list."""
    return offsets.diff().clamp(min=1).unsqueeze(1)
