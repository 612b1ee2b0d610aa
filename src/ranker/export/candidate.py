"""The model of a run folder as it would be handed out, and what is known of it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ranker.data.batch import Batch
from ranker.data.dense_statistics import NOTHING, DenseStatistics
from ranker.data.loader import EvalLoader
from ranker.data.log import Log
from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.export.show import unseen
from ranker.metrics import TaskMetrics
from ranker.runs.run_folder import DATA_MODULE, GLOBAL_STEP, METRICS, NET_PREFIX, STATE_DICT, SUMMARY, whole_lines
from ranker.stability.gate import Evidence


@dataclass(frozen=True)
class Weights:
    """What a checkpoint says of the model.

    Attributes:
        net: the ranker's state.
        statistics: what dense features are normalised with after that step.
        step: optimizer steps.
    """

    net: dict[str, Any]
    statistics: DenseStatistics
    step: int

    @classmethod
    def read(cls, path: Path) -> Weights:
        """Reads a checkpoint without unpickling code.

        Raises:
            UserError: it is no checkpoint of a training run.
        """
        if not path.is_file():
            raise UserError(f"no checkpoint {path}")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state = saved[STATE_DICT]
            data = saved.get(DATA_MODULE, {})
            net = {name.removeprefix(NET_PREFIX): x for name, x in state.items() if name.startswith(NET_PREFIX)}
            step = int(saved[GLOBAL_STEP])
        except Exception as error:  # torch has many errors for a file that is not what it should be
            raise UserError(f"{path} is no checkpoint of a run ({' '.join(str(error).split())[:120]})") from error
        known = data.get("dense_statistics")
        return cls(net, NOTHING if known is None else DenseStatistics.from_state(known), step)


@dataclass(frozen=True)
class Candidate:
    """A model that may be handed out.

    Attributes:
        net: the ranker, with the checkpoint's weights, on the CPU, in evaluation mode.
        weights: the checkpoint.
        log: the log that the run was trained on.
        eval_batch_size: rows of a batch of the hold-out.
    """

    net: nn.Module
    weights: Weights
    log: Log
    eval_batch_size: int

    @classmethod
    def load(cls, net: nn.Module, weights: Weights, *, log: Log, eval_batch_size: int) -> Candidate:
        """Puts a checkpoint's weights into a net.

        Raises:
            UserError: they do not fit.
        """
        try:
            net.load_state_dict(weights.net)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise UserError(f"the checkpoint does not fit the run's model: {' '.join(lines[:2])}") from error
        return cls(net.eval().requires_grad_(False), weights, log, eval_batch_size)

    @property
    def schema(self) -> Schema:
        """Features and tasks."""
        return self.log.schema

    def holdout(self, rows: int | None = None) -> EvalLoader:
        """The hold-out as read, or blocks of it that hold about so many rows."""
        size = self.eval_batch_size if rows is None else min(rows, self.eval_batch_size)
        return EvalLoader(self.log, start=self.log.train_rows, stop=self.log.num_rows, batch_size=size, max_rows=rows)

    def sample(self, rows: int) -> Batch:
        """About so many rows of the hold-out, spread evenly over it."""
        return Batch.concat(list(self.holdout(rows)))

    def evaluate(self, advance: Callable[[int], None] = unseen) -> tuple[dict[str, float], dict[str, int]]:
        """Metrics on the whole hold-out, and how many labels of each task are positive (1, or above 0).

        Args:
            advance: told the rows of each batch.
        """
        metrics = TaskMetrics(self.schema)
        positives_T = torch.zeros(len(self.schema.tasks), dtype=torch.int64)
        with torch.inference_mode():
            for batch in self.holdout():
                known = self.weights.statistics.normalise(batch)
                metrics.update(self.net(known), known.labels_BT, known.mask_BT)
                positives_T += ((known.labels_BT > 0) & known.mask_BT).sum(0)
                advance(len(batch))
        return metrics.compute(), dict(zip(self.schema.task_names, positives_T.tolist(), strict=True))

    def evidence(
        self, folder: Path, metrics: Mapping[str, float], positives: Mapping[str, int], *, eval_max_rows: int | None
    ) -> Evidence:
        """What the gate judges.

        Args:
            folder: the run's.
            metrics: from ``evaluate``.
            positives: from ``evaluate``.
            eval_max_rows: rows of the hold-out that the run looked at while training; None for all.
        """
        state = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
        status, reason = run_status(folder)
        rows = self.log.num_rows - self.log.train_rows
        return Evidence(
            status=status,
            reason=reason,
            nonfinite_weights=[n for n, x in state.items() if x.is_floating_point() and not bool(x.isfinite().all())],
            tasks={task.name: task.type for task in self.schema.tasks},
            metrics=metrics,
            rows={name: int(metrics[f"{name}/observed"]) for name in self.schema.task_names},
            positives=positives,
            best_auc=best_aucs(folder / METRICS, self.schema),
            best_share=min(1.0, eval_max_rows / rows) if eval_max_rows else 1.0,
        )


def run_status(folder: Path) -> tuple[str, str]:
    """Status and reason from summary.json; ``running`` where the run has not ended."""
    path = folder / SUMMARY
    if not path.is_file():
        return "running", f"there is no {SUMMARY}"
    summary = json.loads(path.read_text(encoding="utf-8"))
    return str(summary["status"]), str(summary.get("reason") or "")


def best_aucs(path: Path, schema: Schema) -> dict[str, tuple[float, int]]:
    """By binary task, the highest AUC among all evaluations on the hold-out, and its step."""
    if not path.is_file():
        return {}
    rows = list(csv.DictReader(whole_lines(path).decode().splitlines()))
    best: dict[str, tuple[float, int]] = {}
    for task in schema.tasks:
        for name in (f"val/{task.name}/auc", f"test/{task.name}/auc"):
            found = [(float(row[name]), int(row["step"])) for row in rows if row.get(name)]
            found = [(auc, step) for auc, step in found if math.isfinite(auc)]
            if found:
                best[task.name] = max(found + ([best[task.name]] if task.name in best else []))
    return best


def normalisation(statistics: DenseStatistics, schema: Schema) -> dict[str, Any] | None:
    """What dense features are normalised with, as plain data; None where they are not."""
    if statistics.rows == 0:
        return None
    std_F = np.sqrt(statistics.squares_F / statistics.rows)
    names = [feature.name for feature in schema.dense]
    return {
        "rows": statistics.rows,
        "mean": dict(zip(names, statistics.mean_F.tolist(), strict=True)),
        "std": dict(zip(names, std_F.tolist(), strict=True)),
    }
