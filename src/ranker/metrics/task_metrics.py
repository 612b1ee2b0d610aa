"""Evaluation metrics by task, exact over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from ranker.data.schema import Schema, Task

NAN = math.nan


class _State(Metric):
    """What the metrics need of all rows: sums a task, and every binary logit for an exact AUC.

    One metric for all tasks, so that joining the ranks takes as many collectives for ten tasks as for one.
    States are sums [T] in float64 and, by row, logits [N, binary tasks] in float32 and labels in int8 with -1 for not
    observed: 5 bytes a row and binary task.
    """

    full_state_update = False
    SUMS = ("observed", "nonfinite", "label", "prediction", "loss")
    observed: Tensor
    nonfinite: Tensor
    label: Tensor
    prediction: Tensor
    loss: Tensor
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        is_binary = [task.type == "binary" for task in tasks]
        self.register_buffer("binary_T", torch.tensor(is_binary), persistent=False)
        binary_at = [i for i, b in enumerate(is_binary) if b]
        self.register_buffer("binary_at", torch.tensor(binary_at, dtype=torch.int64), persistent=False)
        for name in self.SUMS:
            self.add_state(name, torch.zeros(len(is_binary), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> None:
        z, y = logits_BT.detach().float(), labels_BT.float()
        usable = mask_BT & z.isfinite()
        # Zeros in place of what does not count, so that the sums need no other care.
        z_used, y_used = torch.where(usable, z, 0.0).double(), torch.where(usable, y, 0.0).double()
        binary_T: Tensor = self.get_buffer("binary_T")
        log_loss = F.softplus(z_used) - y_used * z_used
        # New tensors, not in place: states made under inference mode may meet rows from outside of it.
        self.observed = self.observed + mask_BT.sum(0)
        self.nonfinite = self.nonfinite + (mask_BT & ~usable).sum(0)
        self.label = self.label + y_used.sum(0)
        self.prediction = self.prediction + (torch.where(binary_T, z_used.sigmoid(), z_used) * usable).sum(0)
        self.loss = self.loss + (torch.where(binary_T, log_loss, (z_used - y_used).square()) * usable).sum(0)
        at: Tensor = self.get_buffer("binary_at")
        self.logits.append(z.index_select(1, at))
        self.labels.append(torch.where(mask_BT, y, -1.0).index_select(1, at).to(torch.int8))

    def compute(self) -> tuple[dict[str, float], dict[str, str]]:
        """Values and notes, as in ``TaskMetrics``. Plain numbers: torchmetrics would squeeze tensors of one task."""
        sums = torch.stack([getattr(self, name) for name in self.SUMS]).tolist()
        logits, labels = dim_zero_cat(self.logits), dim_zero_cat(self.labels)
        values: dict[str, float] = {}
        notes: dict[str, str] = {}
        column = 0
        for index, task in enumerate(self.tasks):
            observed, nonfinite, label, prediction, loss = (row[index] for row in sums)
            values |= {f"{task.name}/observed": observed, f"{task.name}/nonfinite": nonfinite}
            trouble = ""
            if not observed:
                trouble = "no row has an observed label"
            elif nonfinite:
                trouble = f"{nonfinite:.0f} of {observed:.0f} predictions are not finite"
            n = NAN if trouble else observed
            calibration = prediction / label if label and not trouble else NAN
            if task.type == "binary":
                own = {
                    "auc": _auc(logits[:, column], labels[:, column], label, n),
                    "logloss": loss / n,
                    "ne": _normalised_entropy(loss, label, n),
                    "calibration": calibration,
                }
                column += 1
            else:
                own = {"rmse": math.sqrt(loss / n) if n == n else NAN, "calibration": calibration}
            for name, value in own.items():
                values[f"{task.name}/{name}"] = value
                if math.isnan(value):
                    notes[f"{task.name}/{name}"] = trouble or _why_undefined(name, label, observed)
        return values, notes


class TaskMetrics(nn.Module):
    """Metrics of every task of a schema, each over the task's observed rows alone.

    Binary, with p = sigmoid(logit), y the label, n rows, b = mean y:

        auc          area under the ROC curve, ties counted half, no bins       0 .. 1
        logloss      mean of -(y log p + (1 - y) log(1 - p))                    nats
        ne           logloss / -(b log b + (1 - b) log(1 - b))                  1 is no better than always saying b
        calibration  mean p / mean y                                            1 is unbiased

    Regression, in the units of the transformed label, which the model is trained on (log1p seconds, not seconds):

        rmse         sqrt(mean (z - y)^2)
        calibration  mean z / mean y

    Both also give ``observed`` (n) and ``nonfinite`` (observed rows whose prediction is nan or infinite).

    A metric that is undefined is nan, and ``notes`` says why: AUC or ne of one class, calibration to a mean of 0, a
    task without rows. Where any prediction of a task is not finite, all its metrics are nan: leaving the rows out
    would flatter a broken model.

    Under ``torch.distributed``, ``compute`` joins the rows of all ranks (never the mean of ranks' AUCs) and gives
    every rank the same; every rank must call it, one without rows too.

    Args:
        schema: gives names and types of the tasks.

    Attributes:
        notes: after ``compute``, by metric, why it is nan.

    Source: AUC by ``torchmetrics.functional.classification.binary_auroc``; normalised entropy by He et al. (2014),
        Practical Lessons from Predicting Clicks on Ads at Facebook; AUC and RMSE are those of Tang et al. (2023),
        Table 2.
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.notes: dict[str, str] = {}
        self.state = _State(schema.tasks)

    def update(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> None:
        """Adds rows. Nothing waits for the device.

        Args:
            logits_BT: the model's output.
            labels_BT: transformed labels, any value where not observed.
            mask_BT: bool, true where observed.
        """
        self.state.update(logits_BT, labels_BT, mask_BT)

    def compute(self) -> dict[str, float]:
        """All metrics of the rows since the last reset, by ``<task>/<metric>``."""
        if not self.state.update_called:
            # A rank without rows still takes part in joining the ranks, with nothing to add.
            device = self.state.observed.device
            nothing = torch.zeros(0, len(self.state.observed), device=device)
            self.state.update(nothing, nothing, nothing.bool())
        values, self.notes = self.state.compute()
        return values

    def reset(self) -> None:
        """Forgets all rows."""
        self.state.reset()
        self.notes = {}


def _auc(logits_N: Tensor, labels_N: Tensor, positives: float, n: float) -> float:
    if math.isnan(n) or positives in (0, n):
        return NAN
    seen = labels_N >= 0
    # Double precision keeps apart scores up to a logit of 36; in single precision all above 17 would be ties.
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
    if name == "calibration":
        return f"the mean of {observed:.0f} observed labels is 0"
    return "the sum of losses is not finite"
