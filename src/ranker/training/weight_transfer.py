"""Which weights of an earlier model a new one takes over: by name, and by feature, id and task where schemas differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ranker.data.schema import CategoricalFeature, Schema
from ranker.models import Ranker
from ranker.models.ranker_base import head_key

# The weight of a width, and what was seen of its rows.
_TABLE = re.compile(r"^embeddings\.(?:tables\.dim_|admission\.(?:seen|last)_)(\d+)(?:\.weight)?$")

Places = tuple[Tensor, Tensor]
"""Places along an axis of the new tensor, and the places of the earlier one that they are copied from, int64 [N]."""
Kept = int | Places
"""Rows that a table keeps: the first so many of both tables, or places in the new table and in the earlier one."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """Where a tensor of the new model comes from.

    Attributes:
        source: its name in the earlier model.
        axes: by axis, what is copied; an axis that is missing is copied whole.
    """

    source: str
    axes: Mapping[int, Places]

    def copy(self, new: Tensor, old: Tensor) -> None:
        """Copies what is taken over into a tensor of the new model, or of its optimizer, in the same shape."""
        if not self.axes:
            new.copy_(old)
            return
        for axis, (_, there) in self.axes.items():
            old = old.index_select(axis, there)
        old = old.to(new.device, new.dtype)
        here = {axis: places.to(new.device) for axis, (places, _) in self.axes.items()}
        if len(here) == 1:
            ((axis, places),) = here.items()
            new.index_copy_(axis, places, old)
        else:
            new[here[0][:, None], here[1]] = old


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The plan for a whole model.

    Attributes:
        moves: by name of the new tensor. A tensor without one starts fresh.
        fresh: what starts fresh, wholly or in part, one line each.
        dropped: tensors of the earlier model that the new one has no place for.
    """

    moves: Mapping[str, Move]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]


def plan(net: Ranker, schema: Schema, old: Mapping[str, Tensor], old_schema: Schema) -> Transfer:
    """Compares two models.

    A table keeps the rows of ids that mean the same in both schemas. A layer that reads the input keeps the columns of
    features that both have. A head or gate belongs to its task, by name. Other tensors are kept where name and shape
    are the same; a widened layer starts fresh.

    Args:
        net: the new model.
        schema: its schema.
        old: state of the earlier model.
        old_schema: its schema.
    """
    moves: dict[str, Move] = {}
    fresh: list[str] = []
    same_input = _columns(schema) == _columns(old_schema)
    axes = net.input_axes()
    changed = {task.name for task in schema.tasks} - set(same_tasks(schema, old_schema))
    fresh += [
        f"task '{name}' is new" if name not in old_schema.task_names else f"task '{name}' has another label"
        for name in sorted(changed)
    ]
    for name, value in net.state_dict().items():
        source, task = _source(name, net, schema, old_schema)
        if task in changed:
            continue
        if source not in old:
            fresh.append(f"{name} is new")
            continue
        there = old[source]
        table = _TABLE.match(name)
        if table:
            places, lines = _table_rows(int(table[1]), schema, old_schema)
            fresh += lines
            moves[name] = Move(source=source, axes={} if places is None else {0: places})
            continue
        over_input = () if same_input else axes.get(name, ())
        found: dict[int, Places] = {axis: _moved(schema, old_schema) for axis in over_input}
        rest = [axis for axis in range(value.ndim) if axis not in found]
        if value.ndim != there.ndim or any(value.shape[axis] != there.shape[axis] for axis in rest):
            fresh.append(f"{name} has shape {list(there.shape)} there and {list(value.shape)} here")
            continue
        moves[name] = Move(source=source, axes=found)
    if not same_input:
        fresh += [f"inputs from {line}" for line in _new_features(schema, old_schema)]
    used = {move.source for move in moves.values()}
    return Transfer(moves=moves, fresh=tuple(fresh), dropped=tuple(name for name in old if name not in used))


def same_tasks(schema: Schema, old_schema: Schema) -> list[str]:
    """Names of the tasks whose label means the same in both schemas, in the order of the new one."""
    old = {task.name: task for task in old_schema.tasks}
    return [
        task.name
        for task in schema.tasks
        if task.name in old
        and (task.type, task.transform, task.scale)
        == (old[task.name].type, old[task.name].transform, old[task.name].scale)
    ]


def rescaled_features(schema: Schema, old_schema: Schema) -> list[str]:
    """One line for each dense feature that both have, and whose values mean something else now."""
    old = {feature.name: feature for feature in old_schema.dense}
    return [
        f"dense feature '{f.name}' has transform {f.transform} and scale {f.scale:g} here, {old[f.name].transform} and "
        f"{old[f.name].scale:g} there: its weights were learned for other numbers"
        for f in schema.dense
        if f.name in old and (f.transform, f.scale) != (old[f.name].transform, old[f.name].scale)
    ]


def _source(name: str, net: Ranker, schema: Schema, old_schema: Schema) -> tuple[str, str | None]:
    """The name of a tensor in the earlier model, and the task that it belongs to; None for a shared one."""
    if name.startswith("heads."):
        key = name.split(".")[2]
        task = next((task for task in schema.task_names if head_key(task) == key), None)
        return name, task
    match = re.match(net.task_number, name) if net.task_number else None
    if match is None:
        return name, None
    task = schema.task_names[int(match[1])]
    if task not in old_schema.task_names:
        return name, task
    return f"{name[: match.start(1)]}{old_schema.task_names.index(task)}{name[match.end(1) :]}", task


def _columns(schema: Schema) -> list[tuple[str, int]]:
    """The features with the number of their columns in the input, in order."""
    return [(f.name, 1) for f in schema.dense] + [(f.name, f.embedding_dim) for f in schema.categorical]


def _moved(schema: Schema, old_schema: Schema) -> Places:
    """The columns of the input that both models have."""
    starts, at = {}, 0
    for name, width in _columns(old_schema):
        starts[name, width] = at
        at += width
    here: list[int] = []
    there: list[int] = []
    at = 0
    for name, width in _columns(schema):
        if (name, width) in starts:
            here += range(at, at + width)
            there += range(starts[name, width], starts[name, width] + width)
        at += width
    return torch.tensor(here, dtype=torch.int64), torch.tensor(there, dtype=torch.int64)


def _new_features(schema: Schema, old_schema: Schema) -> list[str]:
    old = dict(_columns(old_schema))
    return [
        f"feature '{name}', which is new"
        if name not in old
        else f"feature '{name}', whose width was {old[name]} and is {width}"
        for name, width in _columns(schema)
        if old.get(name) != width
    ]


def kept_rows(schema: Schema, old_schema: Schema, *, dim: int | None = None) -> tuple[dict[str, Kept], list[str]]:
    """The rows of each table that mean the same ids in both schemas, by name; and what starts fresh, one line each.

    Args:
        schema: of the new model.
        old_schema: of the earlier one.
        dim: tables of this width only; None: all.
    """
    old = {feature.name: feature for feature in old_schema.categorical if not feature.table}
    found: dict[str, Kept] = {}
    lines = []
    for feature in schema.categorical:
        if feature.table or dim not in (None, feature.embedding_dim):
            continue
        before = old.get(feature.name)
        if before is None or before.embedding_dim != feature.embedding_dim:
            lines.append(f"the table of '{feature.name}' is new")
            continue
        found[feature.name], why = _same_ids(feature, before)
        if why:
            lines.append(f"the table of '{feature.name}': {why}")
    return found, lines


def _table_rows(dim: int, schema: Schema, old_schema: Schema) -> tuple[Places | None, list[str]]:
    """The rows of all tables of a width that mean the same ids; None where all rows do. And what starts fresh."""
    tables, old_tables = _tables(schema, dim), _tables(old_schema, dim)
    if [(f.name, _ids(f)) for f, _ in tables] == [(f.name, _ids(f)) for f, _ in old_tables]:
        return None, []
    kept, lines = kept_rows(schema, old_schema, dim=dim)
    starts, old_starts = ({f.name: start for f, start in found} for found in (tables, old_tables))
    here, there = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for name, rows in kept.items():
        now, before = (torch.arange(rows),) * 2 if isinstance(rows, int) else rows
        here.append(now + starts[name])
        there.append(before + old_starts[name])
    return (torch.cat(here), torch.cat(there)), lines


def _tables(schema: Schema, dim: int) -> list[tuple[CategoricalFeature, int]]:
    """The owners of the tables of a width with their first row, as ``EmbeddingTables`` puts them."""
    found, start = [], 0
    for feature in schema.categorical:
        if not feature.table and feature.embedding_dim == dim:
            found.append((feature, start))
            start += feature.rows
    return found


def _ids(feature: CategoricalFeature) -> tuple[object, ...]:
    return feature.num_embeddings, feature.hash_buckets, feature.vocabulary


def _same_ids(now: CategoricalFeature, before: CategoricalFeature) -> tuple[Kept, str]:
    """The rows of a table that stand for the same ids, row 0 for unknown ones among them, and what is not kept."""
    if _ids(now) == _ids(before):
        return now.rows, ""
    if now.num_embeddings and before.num_embeddings:
        more = now.rows - before.rows
        return min(now.rows, before.rows), f"{more:,} new rows" if more > 0 else ""
    if now.vocabulary and before.vocabulary:
        places = {word: number for number, word in enumerate(before.vocabulary)}
        pairs = [(i, places[word]) for i, word in enumerate(now.vocabulary) if word in places]
        here, there = (torch.tensor([0, *(pair[k] + 1 for pair in pairs)], dtype=torch.int64) for k in (0, 1))
        new = len(now.vocabulary) - len(pairs)
        return (here, there), f"{new:,} new words" if new else ""
    return 1, "its ids have other rows now (hash_buckets or the kind of ids changed)"
