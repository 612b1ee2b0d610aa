"""Trains another library's model on a prepared log, for scripts/bench/bench_training.py: prints one line of JSON.

    python scripts/bench/training_peers.py deepctr-torch --root DIR --model shared_bottom

Needs NumPy, PyArrow, PyYAML, torch and the library itself, not this project, so that each library can live in an
environment of its own. A library is used as its own examples use it: the columns in memory, its ``fit`` or trainer, its
data loader.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml

Columns = dict[str, npt.NDArray[Any]]
SKIPPED = 5  # first steps, as ranker.training.throughput leaves out


@dataclass
class Rows:
    """Columns in memory, in the values that this project's own loader gives: row 0 of a table for null and unknown.

    Attributes:
        schema: the prepared log's schema.yaml.
        dense: float32 [N] each.
        ids: int32 [N] each.
        lists: int32 [N, longest] each, 0 where a list is shorter.
        labels: float32 [N, T].
    """

    schema: dict[str, Any]
    dense: Columns = field(default_factory=dict)
    ids: Columns = field(default_factory=dict)
    lists: Columns = field(default_factory=dict)
    labels: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @property
    def features(self) -> Columns:
        """All features by name, in the schema's order."""
        by_name = self.dense | self.ids | self.lists
        return {f["name"]: by_name[f["name"]] for key in ("dense", "categorical") for f in self.schema.get(key, [])}

    def table(self, feature: dict[str, Any]) -> tuple[str, int]:
        """The feature that owns the embedding table, and the table's rows."""
        owner = _owner(self.schema, feature)
        return owner["name"], 1 + (owner.get("num_embeddings") or owner.get("hash_buckets") or len(owner["vocabulary"]))


def read_rows(root: Path, rows: int | None) -> Rows:
    """Reads the first rows of a prepared log; without a number all but its last file, which is the hold-out.

    A file at a time into arrays of their final size: nothing here should set the peak of a library's memory.

    Raises:
        ValueError: a task has labels that are not observed on every row, which these libraries do not know.
    """
    schema = yaml.safe_load((root / "schema.yaml").read_text(encoding="utf-8"))
    paths = sorted(root.glob("*.parquet"))[:-1]
    total = sum(pq.read_metadata(path).num_rows for path in paths)
    total = total if rows is None else min(rows, total)
    found = Rows(schema, labels=np.empty((total, len(schema["tasks"])), np.float32))
    start = 0
    for path in paths:
        if start < total:
            table = pq.read_table(path, columns=_columns(schema)).slice(0, total - start).combine_chunks()
            _read_features(found, table, start, total)
            found.labels[start : start + len(table)] = _labels(schema, table)
            start += len(table)
    return found


def _columns(schema: dict[str, Any]) -> list[str]:
    every = [*schema.get("dense", []), *schema.get("categorical", []), *schema["tasks"]]
    return list(dict.fromkeys(column.get("column", column["name"]) for column in every))


def _read_features(found: Rows, table: pa.Table, start: int, total: int) -> None:
    """Puts a table's features into the arrays, at row ``start`` of ``total``."""
    place = slice(start, start + len(table))
    for dense in found.schema.get("dense", []):
        values = table[dense.get("column", dense["name"])].fill_null(dense.get("fill_null", 0.0))
        into = found.dense.setdefault(dense["name"], np.empty(total, np.float32))
        into[place] = _transformed(values.to_numpy(), dense)
    for feature in found.schema.get("categorical", []):
        name, owner = feature["name"], _owner(found.schema, feature)
        column = table[feature.get("column", name)].combine_chunks()
        if feature.get("kind", "one_hot") == "one_hot":
            found.ids.setdefault(name, np.empty(total, np.int32))[place] = _table_rows(column, owner)
            continue
        padded = _padded(column, owner, feature.get("max_length", 0))
        into = found.lists.get(name, np.zeros((total, 0), np.int32))
        if into.shape[1] < padded.shape[1]:
            into = np.pad(into, ((0, 0), (0, padded.shape[1] - into.shape[1])))
        into[place, : padded.shape[1]] = padded
        found.lists[name] = into


def _labels(schema: dict[str, Any], table: pa.Table) -> npt.NDArray[np.float32]:
    labels = []
    for task in schema["tasks"]:
        column = table[task.get("column", task["name"])]
        if column.null_count or task.get("mask"):
            raise ValueError(f"task '{task['name']}': the other libraries have no mask for labels not observed")
        values = column.to_numpy()
        labels.append(values >= task["at_least"] if "at_least" in task else _transformed(values, task))
    return np.stack(labels, axis=1).astype(np.float32)


class Enough(Exception):  # noqa: N818 (it is no error)
    """So many steps were taken."""


class Clock:
    """Times a training loop from its optimizer's steps, without the first ones, and ends it after so many.

    Args:
        optimizer: the one that the loop uses.
        steps: when to raise ``Enough``; None for never.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, steps: int | None) -> None:
        self.steps = 0
        self._most = steps
        self._started = self._stopped = 0.0
        optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, *_: object) -> None:
        self.steps += 1
        self._stopped = time.perf_counter()
        if self.steps == SKIPPED:
            self._started = self._stopped
        if self.steps == self._most:
            raise Enough

    def measured(self, rows: Rows, batch_size: int) -> dict[str, float]:
        """Examples and seconds behind the first steps."""
        examples = min(self.steps * batch_size, len(rows.labels)) - SKIPPED * batch_size
        return {"examples": examples, "seconds": self._stopped - self._started}


def train_deepctr(rows: Rows, given: argparse.Namespace) -> dict[str, float]:
    """One epoch of DeepCTR-Torch, by its ``fit``.

    It joins all columns into one array of their common type and makes float32 of each batch. Given float32 it needs
    half the memory that it needs for integers beside float32, and ids here are far below 2**24.
    """
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import MMOE, SharedBottom

    columns: list[Any] = [DenseFeat(name, 1) for name in rows.dense]
    for feature in rows.schema["categorical"]:
        name, (owner, size) = feature["name"], rows.table(feature)
        sparse = SparseFeat(name, size, embedding_dim=feature.get("embedding_dim", 8), embedding_name=owner)
        columns.append(VarLenSparseFeat(sparse, rows.lists[name].shape[1], "mean") if name in rows.lists else sparse)
    types = [task.get("type", "binary") for task in rows.schema["tasks"]]
    shared: dict[str, Any] = {
        "tower_dnn_hidden_units": (),
        "l2_reg_embedding": 0.0,
        "task_types": types,
        "task_names": [task["name"] for task in rows.schema["tasks"]],
    }
    if given.model == "mmoe":
        model = MMOE(
            columns,
            num_experts=given.experts,
            expert_dnn_hidden_units=given.hidden,
            gate_dnn_hidden_units=(),
            **shared,
        )
    else:
        model = SharedBottom(columns, bottom_dnn_hidden_units=given.hidden, **shared)
    losses = ["binary_crossentropy" if kind == "binary" else "mse" for kind in types]
    optimizer = torch.optim.Adagrad(model.parameters(), lr=given.lr)
    model.compile(optimizer, losses)
    clock = Clock(optimizer, steps=given.steps)
    for columns_of in (rows.ids, rows.lists):
        for name in columns_of:
            columns_of[name] = columns_of[name].astype(np.float32)
    with suppress(Enough):
        model.fit(rows.features, rows.labels, batch_size=given.batch_size, epochs=1, verbose=0)
    return clock.measured(rows, given.batch_size) | _size(model)


def train_rechub(rows: Rows, given: argparse.Namespace) -> dict[str, float]:
    """One epoch of torch-rechub, by its trainer. Its MLPs normalise each layer by batch and cannot be had without.

    Its loader runs in line, as in its examples: with a worker process MMoE was slower still on two cores.
    """
    from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE, SharedBottom
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    features: list[Any] = [DenseFeature(name) for name in rows.dense]
    for feature in rows.schema["categorical"]:
        name, (owner, size) = feature["name"], rows.table(feature)
        settings = {"vocab_size": size, "embed_dim": feature.get("embedding_dim", 8)}
        settings["shared_with"] = owner if owner != name else None
        kind = SequenceFeature if name in rows.lists else SparseFeature
        extra = {"pooling": "mean", "padding_idx": 0} if name in rows.lists else {}
        features.append(kind(name, **settings, **extra))
    types = [
        "classification" if task.get("type", "binary") == "binary" else "regression" for task in rows.schema["tasks"]
    ]
    towers: list[dict[str, list[int]]] = [{"dims": []} for _ in types]
    widths = {"dims": given.hidden}
    if given.model == "mmoe":
        model = MMOE(features, types, given.experts, widths, towers)
    else:
        model = SharedBottom(features, types, widths, towers)
    trainer = MTLTrainer(
        model, task_types=types, optimizer_fn=torch.optim.Adagrad, optimizer_params={"lr": given.lr}, n_epoch=1
    )
    x, y = rows.features, rows.labels
    loader, *_ = DataGenerator(x, y).generate_dataloader(x, y, x, y, batch_size=given.batch_size)
    clock = Clock(trainer.optimizer, steps=given.steps)
    with suppress(Enough):
        trainer.train_one_epoch(loader)
    return clock.measured(rows, given.batch_size) | _size(model)


LIBRARIES = {"deepctr-torch": train_deepctr, "torch-rechub": train_rechub}


def main() -> None:
    """Reads the rows, trains on them once, and prints what it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--root", type=Path, required=True, help="a prepared log")
    parser.add_argument("--model", choices=["shared_bottom", "mmoe"], required=True)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64], help="widths of the bottom, or of an expert")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rows", type=int, help="read the first rows only")
    parser.add_argument("--steps", type=int, help="end after so many; the whole epoch otherwise")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    start = time.perf_counter()
    rows = read_rows(given.root, given.rows)
    reading = time.perf_counter() - start
    measured = LIBRARIES[given.library](rows, given)
    print(json.dumps({"version": version(given.library), "seconds_to_read": reading, **measured}))


def _size(model: torch.nn.Module) -> dict[str, float]:
    return {"parameters": sum(p.numel() for p in model.parameters())}


def _owner(schema: dict[str, Any], feature: dict[str, Any]) -> dict[str, Any]:
    return next(f for f in schema["categorical"] if f["name"] == feature.get("table", feature["name"]))


def _transformed(values: npt.NDArray[Any], column: dict[str, Any]) -> npt.NDArray[np.float32]:
    values = values.astype(np.float32) * np.float32(column.get("scale", 1.0))
    return np.copysign(np.log1p(np.abs(values)), values) if column.get("transform") == "log1p" else values


def _table_rows(column: pa.Array, owner: dict[str, Any]) -> npt.NDArray[np.int32]:
    if owner.get("vocabulary"):
        known = pa.array(owner["vocabulary"])
        found = pc.index_in(column.cast(known.type), value_set=known, skip_nulls=True)
        return found.fill_null(-1).to_numpy(zero_copy_only=False) + np.int32(1)
    ids = column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    if owner.get("hash_buckets"):
        ids = np.where(ids < 0, -1, ids % owner["hash_buckets"])
    return (ids + 1).astype(np.int32)


def _padded(column: pa.Array, owner: dict[str, Any], longest: int) -> npt.NDArray[np.int32]:
    """The last ``longest`` ids of each list (all where it is 0), zeros behind them."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    values = _table_rows(column.flatten(), owner)
    ends = np.cumsum(lengths)
    kept = np.minimum(lengths, longest) if longest else lengths
    place = np.arange(max(1, kept.max(initial=0)))
    there = place < kept[:, None]
    padded = np.zeros(there.shape, dtype=np.int32)
    padded[there] = values[(ends - kept)[:, None].repeat(there.shape[1], axis=1)[there] + np.nonzero(there)[1]]
    return padded


if __name__ == "__main__":
    main()
