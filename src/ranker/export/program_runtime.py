"""Runs exported programs with torch or ONNX Runtime, and compares their outputs with the eager model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.dense_statistics import DenseStatistics
from ranker.data.schema import Schema
from ranker.errors import UserError, install_hint
from ranker.export.checked_archive import load_program
from ranker.export.program import LOGITS, SCORES, Served, Signature


class Scored(NamedTuple):
    """The outputs of a program.

    Attributes:
        logits_BT: float32.
        scores_BT: float32; a probability, or a value in the unit of the label.
    """

    logits_BT: Tensor
    scores_BT: Tensor


class Engine(Protocol):
    """A loaded program."""

    def __call__(self, batch: Batch) -> Scored:
        """Scores rows, on the CPU."""
        ...


def open_program(path: Path, *, schema: Schema, threads: int = 0) -> Engine:
    """Loads a program; the suffix of its name decides the format.

    Args:
        path: a file written by ``ranker.export.program``.
        schema: its features and tasks.
        threads: CPU threads; 0 for the default of the library.

    Raises:
        UserError: the file cannot be read, or ONNX Runtime is not installed.
    """
    return _Onnx(path, schema, threads) if path.suffix == ".onnx" else _Torch(path, schema, threads)


class _Torch:
    def __init__(self, path: Path, schema: Schema, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        with _readable(path):
            self._program = load_program(path)
        self._signature = Signature(schema)

    def __call__(self, batch: Batch) -> Scored:
        with torch.inference_mode():
            found = self._program(self._signature.flatten(batch))
        return Scored(found[LOGITS], found[SCORES])


class _Onnx:
    def __init__(self, path: Path, schema: Schema, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"ONNX programs need ONNX Runtime: {install_hint('export')}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only
        with _readable(path):
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._signature = Signature(schema)

    def __call__(self, batch: Batch) -> Scored:
        inputs = {name: tensor.contiguous().numpy() for name, tensor in self._signature.flatten(batch).items()}
        logits, scores = self._session.run([LOGITS, SCORES], inputs)
        return Scored(torch.from_numpy(logits), torch.from_numpy(scores))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own errors for a broken file
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); export it again") from error


SMALL = (1, 2, 3)  # batch sizes that a tracer is most likely to treat as constants


def difference(engine: Engine, served: Served, net: nn.Module, rows: Batch, statistics: DenseStatistics) -> float:
    """Largest difference between exported and eager logits and scores; nan if only one of two values is finite.

        |exported - eager| / max(u, |eager|)        u = 1, for the score of a regression 1 / scale

    The difference is absolute for probabilities and small logits and relative for large values. It does not depend on
    whether a label is in seconds or milliseconds, because u is one unit of the training target. The eager model is the
    net as used in training, on rows that the data path has normalised.

    Args:
        engine: the exported program, loaded from its file.
        served: converts logits to scores.
        net: the ranker.
        rows: rows of the log, as read.
        statistics: of the dense features.
    """
    tasks = served.signature.schema.tasks
    one = torch.ones(len(tasks))
    units = (one, torch.tensor([1.0 if task.type == "binary" else 1.0 / abs(task.scale) for task in tasks]))
    largest = 0.0
    for part in _parts(rows):
        with torch.inference_mode():
            logits_BT = net(statistics.normalise(part)).float()
            wanted = (logits_BT, served.scores(logits_BT))
        for found, eager, unit_T in zip(engine(part), wanted, units, strict=True):
            here = _largest(found, eager, unit_T)
            largest = here if math.isnan(here) else max(largest, here)
            if math.isnan(largest):
                return largest
    return largest


def _largest(found: Tensor, eager: Tensor, unit_T: Tensor) -> float:
    if found.shape != eager.shape:
        return math.nan
    apart = (found - eager).abs() / torch.maximum(eager.abs(), unit_T)
    apart = torch.where(found == eager, 0.0, apart)  # equal infinities
    return float(apart.max()) if apart.numel() else 0.0


def _parts(rows: Batch) -> Sequence[Batch]:
    """Batches of the small sizes, and one batch of the remaining rows."""
    parts, start = [], 0
    for size in SMALL:
        if start + size < len(rows):
            parts.append(rows.slice(start, start + size))
            start += size
    return [*parts, rows.slice(start, len(rows))]
