"""The state of the exact metrics over all rows, joined over the ranks in a few collectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from ranker.data.schema import Task
from ranker.metrics.pointwise import weighted_auc

NAN = math.nan


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is kept of each row beside the logits and labels of binary tasks.

    Attributes:
        rows: whether metrics are computed from rows.
        weights: whether rows have weights: 4 bytes.
        regressions: whether predictions and labels of regressions are kept: 8 bytes each.
        groups: names of the groups whose keys are kept: 8 bytes each.
        features: names of the one-hot features whose ids are kept: 4 bytes each.
    """

    rows: bool = False
    weights: bool = False
    regressions: bool = False
    groups: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


class State(Metric):
    """The state of the metrics over all rows: sums per task, and every binary logit for an exact AUC.

    One torchmetrics object for all tasks, so that joining the ranks takes as many collectives for ten tasks as for one.
    The state is sums [T] in float64, and per row logits [N, binary tasks] in float32 and labels in int8 with -1 for
    unobserved: 5 bytes per row and binary task. ``Kept`` says what else there is per row.
    """

    full_state_update = False
    SUMS = ("observed", "nonfinite", "label", "square", "prediction", "loss")
    weight: Tensor
    values: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor]
    keys: list[Tensor]
    ids: list[Tensor]
    observed: Tensor
    nonfinite: Tensor
    label: Tensor
    square: Tensor
    prediction: Tensor
    loss: Tensor
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, tasks: Sequence[Task], kept: Kept) -> None:
        super().__init__()
        self.tasks, self.kept = tuple(tasks), kept
        is_binary = [task.type == "binary" for task in tasks]
        self.register_buffer("binary_T", torch.tensor(is_binary), persistent=False)
        binary_at = [i for i, b in enumerate(is_binary) if b]
        self.register_buffer("binary_at", torch.tensor(binary_at, dtype=torch.int64), persistent=False)
        regression_at = [i for i, b in enumerate(is_binary) if not b]
        self.register_buffer("regression_at", torch.tensor(regression_at, dtype=torch.int64), persistent=False)
        # A negative that was kept with probability q stands for 1 / q rows.
        self.corrected = any(task.negative_keep_rate != 1 for task in tasks)
        negative_T = torch.tensor([1 / task.negative_keep_rate for task in tasks], dtype=torch.float64)
        self.register_buffer("negative_T", negative_T, persistent=False)
        self.weighted = kept.weights or self.corrected
        for name in (*self.SUMS, *(["weight"] if self.weighted else [])):
            self.add_state(name, torch.zeros(len(is_binary), dtype=torch.float64), dist_reduce_fx="sum")
        for name in self.columns():
            self.add_state(name, [], dist_reduce_fx="cat")

    def columns(self) -> list[str]:
        """Names of the states with one entry per row."""
        kept = self.kept
        found = ["logits", "labels", *(["weights"] if kept.weights else [])]
        found += ["values", "targets"] if kept.regressions else []
        return [*found, *(["keys"] if kept.groups else []), *(["ids"] if kept.features else [])]

    def update(  # noqa: D102
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor | None,
        keys_BG: Tensor | None,
        ids_BF: Tensor | None,
    ) -> None:
        z, y = logits_BT.detach().float(), labels_BT.float()
        usable = mask_BT & z.isfinite()
        # Zeros in place of rows that do not count, so that the sums need no further masks.
        z_used, y_used = torch.where(usable, z, 0.0).double(), torch.where(usable, y, 0.0).double()
        binary_T: Tensor = self.get_buffer("binary_T")
        log_loss, error = F.softplus(z_used) - y_used * z_used, (z_used - y_used).square()
        counted: Tensor = usable
        if self.weighted:
            if self.kept.weights:
                assert weight_B is not None
                counted = usable * weight_B.double()[:, None]
                self.weights.append(weight_B.detach().float())
            if self.corrected:
                counted = counted * torch.where(binary_T & (y_used < 0.5), self.get_buffer("negative_T"), 1.0)
            y_used, square = y_used * counted, y_used.square() * counted
            self.weight = self.weight + counted.sum(0)
        else:
            square = y_used.square()
        # New tensors, because a state created in inference mode must not be changed in place outside of it.
        self.observed = self.observed + mask_BT.sum(0)
        self.nonfinite = self.nonfinite + (mask_BT & ~usable).sum(0)
        self.label = self.label + y_used.sum(0)
        self.square = self.square + square.sum(0)
        self.prediction = self.prediction + (torch.where(binary_T, z_used.sigmoid(), z_used) * counted).sum(0)
        self.loss = self.loss + (torch.where(binary_T, log_loss, error) * counted).sum(0)
        at: Tensor = self.get_buffer("binary_at")
        self.logits.append(z.index_select(1, at))
        self.labels.append(torch.where(mask_BT, y, -1.0).index_select(1, at).to(torch.int8))
        if self.kept.regressions:
            at = self.get_buffer("regression_at")
            self.values.append(z.index_select(1, at))
            self.targets.append(torch.where(mask_BT, y, torch.nan).index_select(1, at))
        if keys_BG is not None:
            self.keys.append(keys_BG)
        if ids_BF is not None:
            self.ids.append(ids_BF.to(torch.int32))

    def compute(self) -> tuple[dict[str, float], dict[str, str], dict[str, Any]]:
        """Values and notes, as in ``TaskMetrics``, and the columns as arrays where metrics are computed from rows.

        No tensors, because torchmetrics squeezes those with one element.
        """
        columns = {name: dim_zero_cat(getattr(self, name)) for name in self.columns()}
        sums = torch.stack([getattr(self, name) for name in self.SUMS]).tolist()
        totals = self.weight.tolist() if self.weighted else sums[0]
        logits, labels, weights = columns["logits"], columns["labels"], columns.get("weights")
        values: dict[str, float] = {}
        notes: dict[str, str] = {}
        column = 0
        for index, task in enumerate(self.tasks):
            observed, nonfinite, label, square, prediction, loss = (row[index] for row in sums)
            values |= {f"{task.name}/observed": observed, f"{task.name}/nonfinite": nonfinite}
            trouble = ""
            if not observed:
                trouble = "no row has an observed label"
            elif nonfinite:
                trouble = f"{nonfinite:.0f} of {observed:.0f} predictions are not finite"
            n = NAN if trouble else totals[index]
            calibration = prediction / label if label and not trouble else NAN
            if task.type == "binary":
                own = {
                    "auc": _auc(logits[:, column], labels[:, column], label, n, weights),
                    "logloss": loss / n,
                    "ne": _normalised_entropy(loss, label, n),
                    "calibration": calibration,
                }
                column += 1
            else:
                variance = square / n - (label / n) ** 2
                own = {
                    "rmse": math.sqrt(loss / n) if n == n else NAN,
                    "r2": 1.0 - loss / n / variance if variance > 1e-12 * max(1.0, square / n) else NAN,
                    "calibration": calibration,
                }
            for name, value in own.items():
                values[f"{task.name}/{name}"] = value
                if math.isnan(value):
                    notes[f"{task.name}/{name}"] = trouble or _why_undefined(name, label, observed)
        return values, notes, {name: x.cpu().numpy() for name, x in columns.items()} if self.kept.rows else {}


def _auc(logits_N: Tensor, labels_N: Tensor, positives: float, n: float, weights_N: Tensor | None) -> float:
    if math.isnan(n) or positives in (0, n):
        return NAN
    seen = labels_N >= 0
    if weights_N is not None:
        rows = (logits_N[seen], labels_N[seen], weights_N[seen].double())
        return weighted_auc(*(column.cpu().numpy() for column in rows))
    # Float64 distinguishes scores up to a logit of 36. In float32 all logits above 17 would be ties.
    scores = logits_N[seen].double().sigmoid()
    return float(binary_auroc(scores, labels_N[seen].long(), validate_args=False))


def _normalised_entropy(loss: float, label: float, n: float) -> float:
    if math.isnan(n) or label in (0, n):
        return NAN
    base = label / n
    entropy = -(base * math.log(base) + (1 - base) * math.log1p(-base))
    return loss / n / entropy


def _why_undefined(name: str, label: float, observed: float) -> str:
    if name in ("auc", "ne"):
        return f"all {observed:.0f} observed labels are {'1' if label else '0'}"
    if name == "r2":
        return f"all {observed:.0f} observed labels are the same"
    if name == "calibration":
        return f"the mean of {observed:.0f} observed labels is 0"
    return "the sum of losses is not finite"
