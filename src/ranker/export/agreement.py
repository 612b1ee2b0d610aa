"""Does an exported program say what the model says? Asked on real rows, in batches of several sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.dense_statistics import DenseStatistics
from ranker.export.engine import Engine
from ranker.export.program import Served

SMALL = (1, 2, 3)  # sizes that a tracer is most likely to take for constants


def difference(engine: Engine, served: Served, net: nn.Module, rows: Batch, statistics: DenseStatistics) -> float:
    """Largest difference of logits and of scores; nan where only one side is finite.

        |exported - eager| / max(u, |eager|)        u = 1, for the score of a regression 1 / scale

    so absolute for probabilities and small logits, relative for large values, and the same whether a label is kept in
    seconds or in milliseconds (u is one unit of what the model is trained on). The eager side is the net as training
    and evaluation call it, on rows that the data path has normalised.

    Args:
        engine: the exported program, as loaded from its file.
        served: turns logits into scores.
        net: the ranker.
        rows: rows of the log, as read.
        statistics: what dense features are normalised with.
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
    apart = torch.where(found == eager, 0.0, apart)  # infinities that agree
    return float(apart.max()) if apart.numel() else 0.0


def _parts(rows: Batch) -> Sequence[Batch]:
    """Some small batches, and the rest."""
    parts, start = [], 0
    for size in SMALL:
        if start + size < len(rows):
            parts.append(rows.slice(start, start + size))
            start += size
    return [*parts, rows.slice(start, len(rows))]
