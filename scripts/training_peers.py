"""Trains another library's model on a prepared log, for scripts/bench_training.py: prints one line of JSON.

    python scripts/training_peers.py deepctr-torch --root DIR --model shared_bottom

Needs NumPy, PyArrow, PyYAML, torch and the library itself, not this project, so that each library can live in an
environment of its own. A library is used as its own examples use it: the columns in memory, its ``fit`` or trainer, its
data loader.
"""

from __future__ import annotations

import argparse
import json
import time
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

    Raises:
        ValueError: a task has labels that are not observed on every row, which these libraries do not know.
    """
    schema = yaml.safe_load((root / "schema.yaml").read_text(encoding="utf-8"))
    features = [*schema.get("dense", []), *schema.get("categorical", [])]
    wanted = list(dict.fromkeys(c.get("column", c["name"]) for c in [*features, *schema["tasks"]]))
    parts: list[pa.Table] = []
    for path in sorted(root.glob("*.parquet"))[:-1]:
        if rows is None or sum(map(len, parts)) < rows:
            parts.append(pq.read_table(path, columns=wanted))
    table = pa.concat_tables(parts).slice(0, rows).combine_chunks()
    found = Rows(schema)
    for dense in schema.get("dense", []):
        values = table[dense.get("column", dense["name"])].fill_null(dense.get("fill_null", 0.0))
        found.dense[dense["name"]] = _transformed(values.to_numpy(), dense)
    for feature in schema.get("categorical", []):
        column, owner = table[feature.get("column", feature["name"])].combine_chunks(), _owner(schema, feature)
        if feature.get("kind", "one_hot") == "one_hot":
            found.ids[feature["name"]] = _table_rows(column, owner)
        else:
            found.lists[feature["name"]] = _padded(column, owner, feature.get("max_length", 0))
    labels = []
    for task in schema["tasks"]:
        column = table[task.get("column", task["name"])]
        if column.null_count or task.get("mask"):
            raise ValueError(f"task '{task['name']}': the other libraries have no mask for labels not observed")
        values = column.to_numpy()
        labels.append(values >= task["at_least"] if "at_least" in task else _transformed(values, task))
    found.labels = np.stack(labels, axis=1).astype(np.float32)
    return found


def train_deepctr(rows: Rows, given: argparse.Namespace) -> dict[str, float]:
    """One epoch of DeepCTR-Torch, by its ``fit``."""
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
    model.compile(torch.optim.Adagrad(model.parameters(), lr=given.lr), losses)
    start = time.perf_counter()
    model.fit(rows.features, rows.labels, batch_size=given.batch_size, epochs=1, verbose=0)
    return _measured(rows, start, model)


def train_rechub(rows: Rows, given: argparse.Namespace) -> dict[str, float]:
    """One epoch of torch-rechub, by its trainer. Its MLPs normalise each layer by batch and cannot be had without."""
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
    start = time.perf_counter()
    trainer.train_one_epoch(loader)
    return _measured(rows, start, model)


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
    parser.add_argument("--rows", type=int, help="train on the first rows only")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    start = time.perf_counter()
    rows = read_rows(given.root, given.rows)
    reading = time.perf_counter() - start
    measured = LIBRARIES[given.library](rows, given)
    print(json.dumps({"version": version(given.library), "seconds_to_read": reading, **measured}))


def _measured(rows: Rows, start: float, model: torch.nn.Module) -> dict[str, float]:
    seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in model.parameters())
    return {"examples": len(rows.labels), "seconds": seconds, "parameters": parameters}


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
