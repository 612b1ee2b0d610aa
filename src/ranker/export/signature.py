"""What an exported program takes and gives: named tensors in a fixed order, made from the schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ranker.data.batch import Batch, Ragged
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task

DENSE, ONEHOT, VALUES, OFFSETS = "dense", "onehot", ".values", ".offsets"
LOGITS, SCORES = "logits", "scores"
ROWS = "rows"


class Signature:
    """The inputs of a program, by name and in order.

        dense          float32 [rows, F]     where the schema has dense features
        onehot         int64   [rows, C]     where it has one-hot features
        NAME.values    int64   [ids]         for each multi-hot or sequence feature: the ids of all rows in one list
        NAME.offsets   int64   [rows + 1]    and where each row's begin: row i has values[offsets[i] : offsets[i + 1]]

    Outputs are ``logits`` and ``scores``, both float32 [rows, T]. A score is a probability for a binary task and a
    value in the label's own unit for a regression.

    Args:
        schema: features and tasks.

    Attributes:
        names: the inputs in order.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.names = [DENSE] if schema.dense else []
        self.names += [ONEHOT] if schema.one_hot else []
        for feature in schema.ragged:
            self.names += [feature.name + VALUES, feature.name + OFFSETS]

    def flatten(self, batch: Batch) -> dict[str, Tensor]:
        """The inputs that hold a batch's features."""
        inputs = {DENSE: batch.dense_BF, ONEHOT: batch.onehot_BC}
        for name, lists in batch.ragged.items():
            inputs |= {name + VALUES: lists.values, name + OFFSETS: lists.offsets}
        return {name: inputs[name] for name in self.names}

    def batch(self, inputs: Mapping[str, Tensor]) -> Batch:
        """The batch that inputs describe, without labels. Sizes are read from shapes, so that it can be traced."""
        first = inputs[self.names[0]]
        rows = first.shape[0] if self.names[0] in (DENSE, ONEHOT) else inputs[self.names[1]].shape[0] - 1
        nothing = first.new_zeros(rows, 0)
        none = torch.zeros(rows, dtype=torch.int64, device=first.device)
        return Batch(
            dense_BF=inputs[DENSE] if self.schema.dense else nothing.float(),
            onehot_BC=inputs[ONEHOT] if self.schema.one_hot else nothing.long(),
            ragged={f.name: Ragged(inputs[f.name + VALUES], inputs[f.name + OFFSETS]) for f in self.schema.ragged},
            labels_BT=nothing.float(),
            mask_BT=nothing.bool(),
            time_ms_B=none,
            row_B=none,
        )

    def example(self) -> dict[str, Tensor]:
        """Three rows of zeros to trace with: a program keeps its example, and nobody's data should travel in it."""
        inputs = {
            DENSE: torch.zeros(3, len(self.schema.dense)),
            ONEHOT: torch.zeros(3, len(self.schema.one_hot), dtype=torch.int64),
        }
        for place, feature in enumerate(self.schema.ragged):
            ids = 5 + place  # a length of its own, or a tracer would take two lists for bound to each other
            inputs[feature.name + VALUES] = torch.zeros(ids, dtype=torch.int64)
            inputs[feature.name + OFFSETS] = torch.tensor([0, 2, 3, ids])
        return {name: inputs[name] for name in self.names}

    def shapes(self) -> dict[str, list[str | int]]:
        """Sizes by input: numbers, or names of what may vary."""
        shapes: dict[str, list[str | int]] = {
            DENSE: [ROWS, len(self.schema.dense)],
            ONEHOT: [ROWS, len(self.schema.one_hot)],
        }
        for feature in self.schema.ragged:
            shapes |= {feature.name + VALUES: [f"ids of {feature.name}"], feature.name + OFFSETS: [f"{ROWS} + 1"]}
        return {name: shapes[name] for name in self.names}

    def describe(self) -> dict[str, Any]:
        """Plain data that tells a server in another language how to make each input and read each output."""
        made: dict[str, list[dict[str, Any]]] = {
            DENSE: [_dense(feature) for feature in self.schema.dense],
            ONEHOT: [_ids(feature, self.schema) for feature in self.schema.one_hot],
        }
        for feature in self.schema.ragged:
            made |= {feature.name + VALUES: [_ids(feature, self.schema)], feature.name + OFFSETS: []}
        inputs = [
            {
                "name": name,
                "dtype": "float32" if name == DENSE else "int64",
                "shape": shape,
                "columns": made[name],
            }
            for name, shape in self.shapes().items()
        ]
        shape = [ROWS, len(self.schema.tasks)]
        return {
            "inputs": inputs,
            "outputs": [{"name": name, "dtype": "float32", "shape": shape} for name in (LOGITS, SCORES)],
            "tasks": [_task(task) for task in self.schema.tasks],
        }


def _dense(feature: DenseFeature) -> dict[str, Any]:
    scaled = f"x * {feature.scale:g}" if feature.scale != 1.0 else "x"
    value = f"sign(y) * log1p(|y|) with y = {scaled}" if feature.transform == "log1p" else scaled
    null = "an error" if feature.fill_null is None else f"x = {feature.fill_null:g}"
    return {"feature": feature.name, "column": feature.column, "value": value, "null": null}


def _ids(feature: CategoricalFeature, schema: Schema) -> dict[str, Any]:
    owner = schema.table_of(feature)
    if owner.vocabulary:
        value = f"1 + place in the vocabulary of '{owner.name}' in schema.yaml; 0 where it is not there"
    elif owner.hash_buckets:
        value = (
            f"1 + h(id) mod {owner.hash_buckets}, h unsigned: splitmix64 of an integer, hash_bytes of a string's UTF-8 "
            "(both in ranker/data/hashing.py)"
        )
    else:
        value = "id + 1"
    if feature.max_length:
        value += f"; the last {feature.max_length} ids of a list"
    return {"feature": feature.name, "column": feature.column, "value": value, "null": "0", "rows": owner.rows}


def _task(task: Task) -> dict[str, Any]:
    if task.type == "binary":
        score = "probability, sigmoid(logit)"
    else:
        inverse = "sign(logit) * expm1(|logit|)" if task.transform == "log1p" else "logit"
        score = f"in the unit of column '{task.column}', {inverse}" + (
            f" / {task.scale:g}" if task.scale != 1.0 else ""
        )
    return {"name": task.name, "type": task.type, "score": score}
