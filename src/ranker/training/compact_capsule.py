"""A capsule of a run with large tables: it has the rows that its batches use, and the batches count in these rows.

A capsule then is one of a small run: a schema with smaller tables, a state that fits it, and batches whose ids are
their places among the used rows. A replay trains on it as on any other. The order of the rows stays, and with it the
order of sums, so that a replay of local tables has the bits of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ranker.capsules.capsule import UsedRows
from ranker.capsules.training_state import TrainingState
from ranker.data.batch import Batch, Ragged
from ranker.data.schema import Schema
from ranker.models.embeddings import place
from ranker.training.fit import Fit


@dataclass(frozen=True, kw_only=True)
class Compact:
    """What a capsule holds.

    Attributes:
        batches: this rank's.
        schema: with tables of as many rows as are used.
        state: None on all ranks but the first.
        rows: the rows of the run's tables that there are, by the feature that owns the table.
    """

    batches: list[Batch]
    schema: Schema
    state: TrainingState | None
    rows: dict[str, UsedRows]


def compact(fit: Fit, state: TrainingState, batches: Sequence[Batch]) -> Compact:
    """Batches and the state before them, with the rows that the batches of all ranks use. All ranks call it.

    Args:
        fit: the running fit.
        state: with a mark.
        batches: this rank's.
    """
    schema, tables = fit.module.schema, fit.module.rows
    assert tables is not None
    owners = [f.name for f in schema.categorical if not f.table and f.embedding_dim in tables.widths]
    used = _over_ranks({name: used_rows(batches, schema, name) for name in owners})
    smaller, (first, _) = smaller_schema(schema, used), place(schema)
    found = tables.rows_at(state.mark, used)
    return Compact(
        batches=[in_used_rows(batch, schema, used) for batch in batches],
        schema=smaller,
        state=None if found is None else tables.filled(state, found, smaller),
        rows={name: UsedRows(rows, first[name]) for name, rows in used.items()},
    )


def used_rows(batches: Sequence[Batch], schema: Schema, owner: str) -> Tensor:
    """The rows of a table that batches use, ascending, int64. Row 0, of unknown ids, and one more are always there."""
    columns, lists = _features(schema, [owner])
    found = [torch.arange(2)]
    for batch in batches:
        found += [batch.onehot_BC[:, column].to("cpu").unique() for column in columns]
        found += [batch.ragged[name].values.to("cpu").unique() for name in lists]
    return torch.cat(found).unique()


def in_used_rows(batch: Batch, schema: Schema, used: Mapping[str, Tensor]) -> Batch:
    """The batch, in host memory; the number of a row is its place among the used rows of its table."""
    columns, lists = _features(schema, used)
    batch = batch.to("cpu")
    onehot_BC, ragged = batch.onehot_BC.clone(), dict(batch.ragged)
    for column, owner in columns.items():
        onehot_BC[:, column] = torch.searchsorted(used[owner], batch.onehot_BC[:, column].contiguous())
    for name, owner in lists.items():
        ragged[name] = Ragged(torch.searchsorted(used[owner], ragged[name].values.contiguous()), ragged[name].offsets)
    return dataclasses.replace(batch, onehot_BC=onehot_BC, ragged=ragged)


def smaller_schema(schema: Schema, used: Mapping[str, Tensor]) -> Schema:
    """The schema with tables of the used rows alone; their ids are places among these."""
    categorical = [
        dataclasses.replace(f, num_embeddings=len(used[f.name]) - 1, hash_buckets=0, vocabulary=())
        if f.name in used
        else f
        for f in schema.categorical
    ]
    return dataclasses.replace(schema, categorical=tuple(categorical))


def _features(schema: Schema, owners: Collection[str]) -> tuple[dict[int, str], dict[str, str]]:
    """Which columns of one-hot ids and which lists look rows up in some tables, each with its table."""
    columns = {i: o for i, f in enumerate(schema.one_hot) if (o := schema.table_of(f).name) in owners}
    lists = {f.name: o for f in schema.ragged if (o := schema.table_of(f).name) in owners}
    return columns, lists


def _over_ranks(used: dict[str, Tensor]) -> dict[str, Tensor]:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return used
    every: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, used)
    return {name: torch.cat([part[name] for part in every]).unique() for name in used}
