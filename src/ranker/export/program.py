"""A ranker as a program that needs no Python of ours: by torch.export, and from that as ONNX."""

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

from ranker.data.dense_statistics import DenseStatistics
from ranker.data.schema import Schema
from ranker.errors import UserError, install_hint
from ranker.export.signature import LOGITS, SCORES, Signature

EXTERNAL_ABOVE = 1_500_000_000  # bytes of weights; a protobuf, which is what an ONNX file is, ends at 2 GiB


class Served(nn.Module):
    """A ranker with what stands before and behind it when it serves: dense statistics, and scores in plain units.

        x' = (x - mean) / std          where the run normalised dense features; in float64, as the data path does
        score = sigmoid(z)             binary task
        score = inverse(z) / scale     regression; inverse of log1p: sign(z) (exp(|z|) - 1)

    The score of a regression on log1p is the inverse of a mean of logarithms, so nearer to a median than to a mean.

    Args:
        net: the ranker.
        schema: its features and tasks.
        statistics: what dense features are normalised with; of no rows where they are not.
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
        """Logits_BT and scores_BT of the inputs that the signature names."""
        batch = self.signature.batch(inputs)
        if self.normalised:
            x_BF = (batch.dense_BF.double() - self.get_buffer("mean_F")) / self.get_buffer("std_F")
            batch = replace(batch, dense_BF=x_BF.float())
        logits_BT = self.net(batch).float()
        return {LOGITS: logits_BT, SCORES: self.scores(logits_BT)}

    def scores(self, logits_BT: Tensor) -> Tensor:
        """What a logit means, in the task's own unit, [B, T]."""
        columns = []
        for task, z_B in zip(self.signature.schema.tasks, logits_BT.unbind(1), strict=True):
            if task.type == "binary":
                columns.append(z_B.sigmoid())
                continue
            value_B = z_B.sign() * z_B.abs().expm1() if task.transform == "log1p" else z_B
            columns.append(value_B / task.scale if task.scale != 1.0 else value_B)
        return torch.stack(columns, dim=1)


def to_program(served: Served) -> ExportedProgram:
    """Traces the model into a program that takes any number of rows, also one, and lists of any length, also none.

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
    """Writes the program as ONNX, with inputs and outputs named as in the signature.

    Raises:
        UserError: the packages of the extra ``export`` are not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs additional packages: {install_hint('export')}") from error
    table = {torch.ops.aten.repeat_interleave.self_Tensor: _repeat_interleave}
    size = sum(tensor.numel() * tensor.element_size() for tensor in served.state_dict().values())
    with torch.no_grad(), _quiet():
        plain = program.run_decompositions(table)
        made = torch.onnx.export(
            plain, dynamo=True, input_names=served.signature.names, output_names=[LOGITS, SCORES], verbose=False
        )
        assert made is not None
        made.save(str(path), external_data=size > EXTERNAL_ABOVE)


def _repeat_interleave(x: Tensor, repeats: Tensor, dim: int | None = None, *, output_size: int) -> Tensor:
    """``torch.repeat_interleave`` of a vector, in operations that ONNX has.

    Place i belongs to the list after all that end at or before i: counted by a running sum over marks at the ends.
    """
    assert dim in (None, 0)
    ends = repeats.cumsum(0)
    marks = ends.new_zeros(output_size + 1).scatter_add(0, ends, torch.ones_like(ends))
    return x.index_select(0, marks[:-1].cumsum(0))


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Lets a traced size be 0 or 1: torch would else take it for at least 2, and the program would refuse one row."""
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):  # torch before 2.7 does not check sizes when a program runs
        yield
        return
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what torch's exporters say of themselves and nobody here can do anything about."""
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
