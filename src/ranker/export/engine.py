"""Exported programs at work: rows in, logits and scores out, by torch or by ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.errors import UserError, install_hint
from ranker.export.signature import LOGITS, SCORES, Signature


class Scored(NamedTuple):
    """What a program gives.

    Attributes:
        logits_BT: float32.
        scores_BT: float32; a probability, or a value in the label's own unit.
    """

    logits_BT: Tensor
    scores_BT: Tensor


class Engine(Protocol):
    """Runs a program."""

    def __call__(self, batch: Batch) -> Scored:
        """Scores rows, on the CPU."""
        ...


def open_program(path: Path, *, schema: Schema, threads: int = 0) -> Engine:
    """Loads a program by the ending of its name.

    Args:
        path: a file that ``ranker.export.program`` wrote.
        schema: its features and tasks.
        threads: CPU threads; 0 leaves each library its own choice.

    Raises:
        UserError: the file cannot be read, or ONNX Runtime is not installed.
    """
    return _Onnx(path, schema, threads) if path.suffix == ".onnx" else _Torch(path, schema, threads)


class _Torch:
    def __init__(self, path: Path, schema: Schema, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        with _readable(path):
            self._program = torch.export.load(path).module()
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
        options.log_severity_level = 3  # errors alone
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
    except Exception as error:  # each library has errors of its own for a broken file
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); export it again") from error
