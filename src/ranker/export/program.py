"""A trained ranker as a standalone program for serving: its inputs and outputs, torch.export, and ONNX."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ranker.data.batch import Batch, Ragged
from ranker.data.dense_statistics import DenseStatistics
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.errors import UserError, install_hint

DENSE, ONEHOT, VALUES, OFFSETS = "dense", "onehot", ".values", ".offsets"
LOGITS, SCORES = "logits", "scores"
ROWS = "rows"


class Signature:
    """The named inputs and outputs of a program, in a fixed order.

        dense          float32 [rows, F]     where the schema has dense features
        onehot         int64   [rows, C]     where it has one-hot features
        NAME.values    int64   [ids]         for each multi-hot or sequence feature: the ids of all rows in one list
        NAME.offsets   int64   [rows + 1]    row i has values[offsets[i] : offsets[i + 1]]

    The outputs are ``logits`` and ``scores``, both float32 [rows, T]. The score of a binary task is a probability, of a
    regression a value in the unit of the label.

    Args:
        schema: features and tasks.

    Attributes:
        names: of the inputs, in order.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.names = [DENSE] if schema.dense else []
        self.names += [ONEHOT] if schema.one_hot else []
        for feature in schema.ragged:
            self.names += [feature.name + VALUES, feature.name + OFFSETS]

    def flatten(self, batch: Batch) -> dict[str, Tensor]:
        """The inputs for a batch."""
        inputs = {DENSE: batch.dense_BF, ONEHOT: batch.onehot_BC}
        for name, lists in batch.ragged.items():
            inputs |= {name + VALUES: lists.values, name + OFFSETS: lists.offsets}
        return {name: inputs[name] for name in self.names}

    def batch(self, inputs: Mapping[str, Tensor]) -> Batch:
        """The batch for some inputs, without labels. Sizes are taken from shapes, so that it can be traced."""
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
        """Three rows of zeros to trace with. The program file contains its example, so it must not be user data."""
        inputs = {
            DENSE: torch.zeros(3, len(self.schema.dense)),
            ONEHOT: torch.zeros(3, len(self.schema.one_hot), dtype=torch.int64),
        }
        for place, feature in enumerate(self.schema.ragged):
            ids = 5 + place  # distinct lengths: the tracer would assume that lists of equal length always are
            inputs[feature.name + VALUES] = torch.zeros(ids, dtype=torch.int64)
            inputs[feature.name + OFFSETS] = torch.tensor([0, 2, 3, ids])
        return {name: inputs[name] for name in self.names}

    def shapes(self) -> dict[str, list[str | int]]:
        """The shape of each input: numbers, and names for dimensions that vary."""
        shapes: dict[str, list[str | int]] = {
            DENSE: [ROWS, len(self.schema.dense)],
            ONEHOT: [ROWS, len(self.schema.one_hot)],
        }
        for feature in self.schema.ragged:
            shapes |= {feature.name + VALUES: [f"ids of {feature.name}"], feature.name + OFFSETS: [f"{ROWS} + 1"]}
        return {name: shapes[name] for name in self.names}

    def describe(self) -> dict[str, Any]:
        """A description for servers in other languages: how to compute each input and interpret each output."""
        columns: dict[str, list[dict[str, Any]]] = {
            DENSE: [_dense(feature) for feature in self.schema.dense],
            ONEHOT: [_ids(feature, self.schema) for feature in self.schema.one_hot],
        }
        for feature in self.schema.ragged:
            columns |= {feature.name + VALUES: [_ids(feature, self.schema)], feature.name + OFFSETS: []}
        inputs = [
            {
                "name": name,
                "dtype": "float32" if name == DENSE else "int64",
                "shape": shape,
                "columns": columns[name],
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
        if task.negative_keep_rate != 1:
            score += f"; of the whole log, of whose negatives {task.negative_keep_rate:g} were kept"
    else:
        inverse = "sign(logit) * expm1(|logit|)" if task.transform == "log1p" else "logit"
        score = f"in the unit of column '{task.column}', {inverse}" + (
            f" / {task.scale:g}" if task.scale != 1.0 else ""
        )
    return {"name": task.name, "type": task.type, "score": score}


EXTERNAL_ABOVE = 1_500_000_000  # bytes of weights; an ONNX file is a protobuf, which is limited to 2 GiB


class Served(nn.Module):
    """A ranker together with the normalisation of its dense features and the conversion of logits to scores.

        x' = (x - mean) / std          if the run normalised dense features; in float64, as in training
        score = sigmoid(z)             binary task
        score = inverse(z) / scale     regression; inverse of log1p: sign(z) (exp(|z|) - 1)

    With the transform log1p, a regression estimates the mean of logarithms. Its score is therefore closer to the median
    of the label than to its mean.

    Args:
        net: the ranker.
        schema: its features and tasks.
        statistics: for the normalisation; with 0 rows if the run does not normalise.
    """

    def __init__(self, net: nn.Module, *, schema: Schema, statistics: DenseStatistics) -> None:
        super().__init__()
        self.net = net
        self.signature = Signature(schema)
        self.normalised = statistics.rows > 0
        if self.normalised:
            std_F = np.sqrt(statistics.squares_F / statistics.rows)
            self.register_buffer("mean_F", torch.from_numpy(statistics.mean_F))
            self.register_buffer("std_F", torch.from_numpy(np.where(std_F > 0, std_F, 1.0)))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits_BT and scores_BT for the inputs of the signature."""
        batch = self.signature.batch(inputs)
        if self.normalised:
            x_BF = (batch.dense_BF.double() - self.get_buffer("mean_F")) / self.get_buffer("std_F")
            batch = replace(batch, dense_BF=x_BF.float())
        logits_BT = self.net(batch).float()
        return {LOGITS: logits_BT, SCORES: self.scores(logits_BT)}

    def scores(self, logits_BT: Tensor) -> Tensor:
        """Converts logits to scores in the unit of each label, [B, T]."""
        columns = []
        for task, z_B in zip(self.signature.schema.tasks, logits_BT.unbind(1), strict=True):
            if task.type == "binary":
                columns.append(z_B.sigmoid())
                continue
            value_B = z_B.sign() * z_B.abs().expm1() if task.transform == "log1p" else z_B
            columns.append(value_B / task.scale if task.scale != 1.0 else value_B)
        return torch.stack(columns, dim=1)


def to_program(served: Served) -> ExportedProgram:
    """Traces the model into a program for any number of rows (1 or more) and lists of any length (also empty).

    Args:
        served: the model, on the CPU.
    """
    served.eval()
    signature = served.signature
    rows = Dim("rows", min=1)
    sizes: dict[str, dict[int, Any]] = {}
    for place, (name, shape) in enumerate(signature.shapes().items()):
        size = {"rows": rows, "rows + 1": rows + 1}.get(str(shape[0]))
        sizes[name] = {0: Dim(f"ids_{place}", min=0) if size is None else size}
    with torch.no_grad(), _any_size(), _quiet():
        return torch.export.export(served, (signature.example(),), dynamic_shapes={"inputs": sizes}, strict=False)


def to_onnx(program: ExportedProgram, served: Served, path: Path) -> None:
    """Writes the program as ONNX, with the input and output names of the signature.

    Raises:
        UserError: the packages of the extra ``export`` are missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX export needs more packages: {install_hint('export')}") from error
    table = {torch.ops.aten.repeat_interleave.self_Tensor: _repeat_interleave}
    size = sum(tensor.numel() * tensor.element_size() for tensor in served.state_dict().values())
    with torch.no_grad(), _quiet():
        decomposed = program.run_decompositions(table)
        made = torch.onnx.export(
            decomposed, dynamo=True, input_names=served.signature.names, output_names=[LOGITS, SCORES], verbose=False
        )
        assert made is not None
        made.save(str(path), external_data=size > EXTERNAL_ABOVE)


def _repeat_interleave(x: Tensor, repeats: Tensor, dim: int | None = None, *, output_size: int) -> Tensor:
    """``torch.repeat_interleave`` of a vector, in operators that ONNX has.

    The list of position i is the number of lists that end at or before i, a cumulative sum over marks at their ends.
    """
    assert dim in (None, 0)
    ends = repeats.cumsum(0)
    marks = ends.new_zeros(output_size + 1).scatter_add(0, ends, torch.ones_like(ends))
    return x.index_select(0, marks[:-1].cumsum(0))


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Allows traced sizes of 0 and 1. By default torch assumes 2 or more, and the program would refuse a single row.

    Private API of torch: there is no public setting for it.
    """
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):  # torch before 2.7, which does not check sizes at run time
        yield
        return
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings and log messages of torch's exporters that users cannot act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
