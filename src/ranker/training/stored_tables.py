"""Embedding tables of an earlier run as they lie on the disk, read a few rows at a time.

A process that has a part of the rows takes these and no others. The files are mapped: nothing is read before it is
asked for, and what was read belongs to the system's cache and not to the process.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.models.embeddings import place
from ranker.runs.checkpoint_files import shards_of
from ranker.runs.run_folder import NET_PREFIX, SHARDED, STATE_DICT
from ranker.runs.table_files import Slice, copy_of, mapped, mapped_copy
from ranker.training import accumulators
from ranker.training.sharded_checkpoint import ACCUMULATOR, WEIGHT, Reader
from ranker.training.table_checkpoints import TABLE_ROWS

BLOCK = 65_536
"""Rows that are copied at a time."""
_SUM = "sum"  # Adagrad's accumulator in the state of an optimizer
_LOCAL = "embeddings.tables.dim_{}.weight"  # with all tables of a width
_IS_LOCAL = re.compile(r"embeddings\.tables\.dim_\d+\.weight$")
HANDLE = "embeddings"  # name of the parameter that stands for sharded tables in an optimizer


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A rectangle of a tensor.

    Attributes:
        row: its first row.
        column: its first column.
        width: its columns.
        values: [rows, width]; or [rows, 1], one value for all columns of a row; or the bytes of these rows, uint8.
        dtype: of the values.
    """

    row: int
    column: int
    width: int
    values: Tensor
    dtype: torch.dtype

    def at(self, rows_N: Tensor) -> Tensor:
        """Rows, counted from the first one of the part, [N, width]; in memory of their own."""
        found = self.values.index_select(0, rows_N)  # bytes are copied first: in the file they may lie at odd places
        return (found if found.dtype == self.dtype else found.view(self.dtype)).expand(-1, self.width)


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor with the rows of a table.

    Attributes:
        parts: what there is of it. Together they have every row of the table.
        first: row of the tensor that is the first one of the table.
        moved: rows that replace those of the parts, by row of the tensor, sorted; None for none.
    """

    parts: Sequence[Part]
    first: int = 0
    moved: tuple[Tensor, Tensor] | None = None

    def read(self, rows_N: Tensor, column: int, width: int) -> Tensor:
        """Some columns of some rows of the table, float32 [N, width]."""
        rows_N = rows_N + self.first
        found = torch.empty(len(rows_N), width)
        if not len(rows_N):
            return found
        lowest, highest = int(rows_N.min()), int(rows_N.max())
        for part in self.parts:
            end = part.row + len(part.values)
            left, right = max(column, part.column), min(column + width, part.column + part.width)
            if left >= right or end <= lowest or part.row > highest:
                continue
            here = ((rows_N >= part.row) & (rows_N < end)).nonzero().view(-1)
            values = part.at(rows_N[here] - part.row)[:, left - part.column : right - part.column]
            found[here, left - column : right - column] = values.float()
        if self.moved is not None:
            rows, values = self.moved
            places = torch.searchsorted(rows, rows_N).clamp(max=len(rows) - 1)
            here = (rows[places] == rows_N).nonzero().view(-1)
            found[here] = values[places[here]][:, column : column + width].float()
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTable:
    """A table of an earlier run.

    Attributes:
        rows: number of rows.
        dim: width of a row.
        parameter: name of the weight that has it in a net with local tables, with all tables of the width.
        weight: its weights.
        accumulator: G of Adagrad, by coordinate; None where the run kept none.
        by_row: whether the run had one accumulator a row, or a row of a part.
    """

    rows: int
    dim: int
    parameter: str
    weight: Stored
    accumulator: Stored | None
    by_row: bool

    def accumulators_of_rows(self, rows_N: Tensor, column: int, width: int) -> Tensor:
        """G of row-wise Adagrad over some columns, [N]: the mean, which is what it would have summed up itself."""
        assert self.accumulator is not None
        found = self.accumulator.read(rows_N, column, width)
        same = found.amin(1) == found.amax(1)  # a mean of equal numbers may be rounded
        return torch.where(same, found[:, 0], found.mean(1))


def of_sharded(saved: Mapping[str, Any], path: Path) -> dict[str, StoredTable]:
    """The tables of a checkpoint of a run with sharded tables, by name, in the order of its schema.

    Args:
        saved: the checkpoint.
        path: its file.

    Raises:
        UserError: the folder with the tables is missing or damaged, or does not have these tables.
    """
    folder, found = shards_of(path), {}
    index = Reader(folder).read_metadata()
    for name, rows, dim in saved[SHARDED]["tables"]:
        try:
            weight = sorted(_parts(index, folder, f"{name}/{WEIGHT}"), key=lambda part: (part.column, part.row))
            total = sorted(_parts(index, folder, f"{name}/{ACCUMULATOR}"), key=lambda part: part.row)
            by_row = all(part.values.shape[1] == part.dtype.itemsize for part in total) and dim > 1
            if by_row:  # those of column-wise parts lie one after another, in the order of the columns
                total = [
                    Part(row=w.row, column=w.column, width=w.width, values=part.values, dtype=part.dtype)
                    for w, part in zip(weight, total, strict=True)
                ]
        except (KeyError, OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
            why = " ".join(str(error).split())[:160]
            raise UserError(
                f"{folder} cannot be read: the table of '{name}' ({type(error).__name__}: {why})"
            ) from error
        stored = [sum(part.width * len(part.values) for part in parts) for parts in (weight, total)]
        if stored != [rows * dim] * 2:
            raise UserError(f"{folder} has not every row of the table of '{name}', {rows:,} of {dim} columns")
        found[str(name)] = StoredTable(
            rows=rows,
            dim=dim,
            parameter=parameter_of(dim),
            weight=Stored(weight),
            accumulator=Stored(total),
            by_row=by_row,
        )
    return found


def _parts(index: Any, folder: Path, key: str) -> Iterator[Part]:
    known = index.state_dict_metadata[key]
    for chunk in known.chunks:
        flat = len(chunk.sizes) == 1  # accumulators of rows
        row, column = chunk.offsets[0], 0 if flat else chunk.offsets[1]
        rows, width = chunk.sizes[0], 1 if flat else chunk.sizes[1]
        at = index.storage_data[MetadataIndex(key, chunk.offsets)]
        path = folder / at.relative_path
        # torch writes an archive for each tensor, with its bytes as they lie in memory, row after row.
        with path.open("rb") as file, zipfile.ZipFile(Slice(file, at.offset, at.length)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data/0"))
            values = mapped(path, archive, name, before=at.offset)
        dtype = known.properties.dtype
        if len(values) != rows * width * dtype.itemsize:
            raise ValueError(f"{len(values)} bytes for {rows} x {width} numbers")
        yield Part(row=row, column=column, width=width, values=values.view(rows, -1), dtype=dtype)


def of_local(path: Path, schema: Schema) -> dict[str, StoredTable]:
    """The tables of a checkpoint of a run with ``embeddings=local``, by name; without those that it does not have.

    Args:
        path: the file.
        schema: that of its run.

    Raises:
        UserError: the full copy that it adds to is missing or damaged, or the tables are not as the schema says.
    """
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    replaced = saved.get(TABLE_ROWS, {"tables": {}})["tables"]  # the rest of these is in a full copy
    copy = copy_of(path) if replaced else None
    pieces = mapped_copy(copy) if copy else {}
    state = accumulators.by_name(saved["optimizer_states"][0])

    def tensor(parameter: str, key: str, first: int) -> Stored | None:
        if parameter in replaced:
            rows, values = replaced[parameter]["rows"], replaced[parameter]["tensors"].get(key)
            if values is None:
                return None
            parts = [
                Part(row=row, column=0, width=values.shape[1], values=piece, dtype=values.dtype)
                for row, piece in pieces[f"{parameter}/{key}"]
            ]
            return Stored(parts, first, (rows, values) if len(rows) else None)
        if key == WEIGHT:
            return _in_one_part(saved[STATE_DICT].get(f"{NET_PREFIX}{parameter}"), first)
        return _in_one_part(state.get(parameter, {}).get(key), first)

    return _of_parameters(schema, tensor, path)


def of_weights(net: Mapping[str, Tensor], schema: Schema, path: Path) -> dict[str, StoredTable]:
    """The tables among the weights of a net with local tables, by name; without accumulators.

    Args:
        net: the weights, which may lie in a mapped file.
        schema: that of the net.
        path: where they are from, for errors.

    Raises:
        UserError: the weights are not as the schema says.
    """
    return _of_parameters(
        schema, lambda name, key, first: _in_one_part(net.get(name) if key == WEIGHT else None, first), path
    )


def _in_one_part(values: Tensor | None, first: int) -> Stored | None:
    if values is None or values.ndim != 2:
        return None
    return Stored([Part(row=0, column=0, width=values.shape[1], values=values, dtype=values.dtype)], first)


def _of_parameters(
    schema: Schema, tensor: Callable[[str, str, int], Stored | None], path: Path
) -> dict[str, StoredTable]:
    """Tables of which all of a width are one tensor, given its name, what it is, and the first row of the table."""
    found = {}
    starts, rows = place(schema)
    for name, first in starts.items():
        feature = next(f for f in schema.categorical if f.name == name)
        dim = feature.embedding_dim
        parameter = parameter_of(dim)
        weight = tensor(parameter, WEIGHT, first)
        if weight is None:
            continue
        if sum(len(part.values) for part in weight.parts if part.width == dim) != rows[dim]:
            raise UserError(
                f"warm_start: {parameter} of {path} has not the {rows[dim]:,} rows of {dim} columns that its schema "
                "says; give another run, checkpoint or export"
            )
        found[name] = StoredTable(
            rows=feature.rows,
            dim=dim,
            parameter=parameter,
            weight=weight,
            accumulator=tensor(parameter, _SUM, first),
            by_row=False,
        )
    return found


def parameter_of(dim: int) -> str:
    """The name of the weight with all local tables of a width, within the net."""
    return _LOCAL.format(dim)


def whole(tables: Collection[StoredTable], part: str) -> dict[str, Tensor]:
    """Weights or accumulators of tables as ``EmbeddingTables`` has them, by the names of its weights.

    Args:
        tables: in the order of the schema.
        part: ``weight`` or ``accumulator``.
    """
    rows: Counter[str] = Counter()
    for table in tables:
        rows[table.parameter] += table.rows
    found = {table.parameter: torch.empty(rows[table.parameter], table.dim) for table in tables}
    start = dict.fromkeys(found, 0)
    for table in tables:
        stored: Stored = getattr(table, part)
        for low in range(0, table.rows, BLOCK):
            rows_N = torch.arange(low, min(low + BLOCK, table.rows))
            first = start[table.parameter] + low
            found[table.parameter][first : first + len(rows_N)] = stored.read(rows_N, 0, table.dim)
        start[table.parameter] += table.rows
    return found


def is_table(name: str) -> bool:
    """Whether a parameter of a net is a weight with local tables."""
    return _IS_LOCAL.match(name) is not None


def groups_as_local(groups: Sequence[Mapping[str, Any]], tables: Mapping[str, StoredTable]) -> list[dict[str, Any]]:
    """The groups of an optimizer of a run with sharded tables as one with local tables has them.

    Args:
        groups: with a group for the learning rate of the tables.
        tables: those of the run.
    """
    names = list(dict.fromkeys(table.parameter for table in tables.values()))
    return [{**g, "param_names": names} if g.get("param_names") == [HANDLE] else dict(g) for g in groups]


def gathered(saved: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tables of a checkpoint as ``EmbeddingTables`` has them, by name within the net, gathered in this process.

    Args:
        saved: the checkpoint; empty is returned for one without sharded tables.
        path: its file.

    Raises:
        UserError: the folder with the tables is missing or damaged.
    """
    return whole(of_sharded(saved, path).values(), WEIGHT) if SHARDED in saved else {}
