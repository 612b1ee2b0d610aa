"""Metrics per task: exact metrics for evaluation, and a running AUC for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from ranker.data.schema import Schema, Task
from ranker.errors import UserError

NAN = math.nan


class _State(Metric):
    """The state of the metrics over all rows: sums per task, and every binary logit for an exact AUC.

    One torchmetrics object for all tasks, so that joining the ranks takes as many collectives for ten tasks as for one.
    The state is sums [T] in float64, and per row logits [N, binary tasks] in float32 and labels in int8 with -1 for
    unobserved: 5 bytes per row and binary task.
    """

    full_state_update = False
    SUMS = ("observed", "nonfinite", "label", "square", "prediction", "loss")
    observed: Tensor
    nonfinite: Tensor
    label: Tensor
    square: Tensor
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
        # Zeros in place of rows that do not count, so that the sums need no further masks.
        z_used, y_used = torch.where(usable, z, 0.0).double(), torch.where(usable, y, 0.0).double()
        binary_T: Tensor = self.get_buffer("binary_T")
        log_loss = F.softplus(z_used) - y_used * z_used
        # New tensors, because a state created in inference mode must not be changed in place outside of it.
        self.observed = self.observed + mask_BT.sum(0)
        self.nonfinite = self.nonfinite + (mask_BT & ~usable).sum(0)
        self.label = self.label + y_used.sum(0)
        self.square = self.square + y_used.square().sum(0)
        self.prediction = self.prediction + (torch.where(binary_T, z_used.sigmoid(), z_used) * usable).sum(0)
        self.loss = self.loss + (torch.where(binary_T, log_loss, (z_used - y_used).square()) * usable).sum(0)
        at: Tensor = self.get_buffer("binary_at")
        self.logits.append(z.index_select(1, at))
        self.labels.append(torch.where(mask_BT, y, -1.0).index_select(1, at).to(torch.int8))

    def compute(self) -> tuple[dict[str, float], dict[str, str]]:
        """Values and notes, as in ``TaskMetrics``. Python numbers: torchmetrics squeezes tensors of one task."""
        sums = torch.stack([getattr(self, name) for name in self.SUMS]).tolist()
        logits, labels = dim_zero_cat(self.logits), dim_zero_cat(self.labels)
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
        return values, notes


class TaskMetrics(nn.Module):
    """Metrics of all tasks of a schema, each over the task's observed rows only.

    Binary, with p = sigmoid(logit), y the label, n rows, b = mean y:

        auc          area under the ROC curve, ties counted half, no bins       0 .. 1
        logloss      mean of -(y log p + (1 - y) log(1 - p))                    nats
        ne           logloss / -(b log b + (1 - b) log(1 - b))                  1 is no better than always predicting b
        calibration  mean p / mean y                                            1 is unbiased

    Regression, in the units of the transformed label that the model is trained on (log1p seconds, not seconds):

        rmse         sqrt(mean (z - y)^2)
        r2           1 - mean (z - y)^2 / variance of y       0 is no better than always predicting the mean
        calibration  mean z / mean y

    Both also have ``observed`` (n) and ``nonfinite`` (observed rows with a prediction that is nan or infinite).

    An undefined metric is nan, and ``notes`` gives the reason: AUC or ne with one class, calibration with a mean label
    of 0, or a task without rows. If any prediction of a task is not finite, all metrics of the task are nan, because
    leaving these rows out would flatter a broken model.

    Under ``torch.distributed``, ``compute`` joins the rows of all ranks (it does not average the ranks' AUCs) and
    returns the same values on every rank. Every rank must call it, even without rows.

    Args:
        schema: gives names and types of the tasks.

    Attributes:
        notes: after ``compute``, the reason for each metric that is nan.

    Source: AUC by ``torchmetrics.functional.classification.binary_auroc``; normalised entropy by He et al. (2014),
        Practical Lessons from Predicting Clicks on Ads at Facebook; AUC and RMSE are those of Tang et al. (2023),
        Table 2.
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.notes: dict[str, str] = {}
        self.state = _State(schema.tasks)

    def update(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> None:
        """Adds rows, without a device synchronisation.

        Args:
            logits_BT: the model's output.
            labels_BT: transformed labels, any value where not observed.
            mask_BT: bool, true where observed.
        """
        self.state.update(logits_BT, labels_BT, mask_BT)

    def compute(self) -> dict[str, float]:
        """All metrics of the rows since the last reset, by ``<task>/<metric>``. Joins the ranks."""
        if not self.state.update_called:
            # A rank without rows still takes part in the collectives, with empty state.
            device = self.state.observed.device
            nothing = torch.zeros(0, len(self.state.observed), device=device)
            self.state.update(nothing, nothing, nothing.bool())
        values, self.notes = self.state.compute()
        return values

    def reset(self) -> None:
        """Removes all rows."""
        self.state.reset()
        self.notes = {}


def _auc(logits_N: Tensor, labels_N: Tensor, positives: float, n: float) -> float:
    if math.isnan(n) or positives in (0, n):
        return NAN
    seen = labels_N >= 0
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


class StreamingStats(NamedTuple):
    """The values of ``StreamingAUC``, per task.

    Attributes:
        auc_T: AUC over recent batches. nan for regressions and if one class is missing.
        batch_auc_T: AUC over the last batch alone, likewise. It compares only rows that the same weights have scored.
        positives_T: number of positive labels of the last batch; 0 for regressions.
        labels_T: number of observed labels of the last batch.
        variance_T: their variance; nan without any.
        spread_T: standard deviation of the last batch's finite logits, over all its rows (root of the mean of the
            ranks' variances, weighted by rows). nan without any.
        nonfinite_T: number of logits of the last batch that are nan or infinite, observed or not.
    """

    auc_T: Tensor
    batch_auc_T: Tensor
    positives_T: Tensor
    labels_T: Tensor
    variance_T: Tensor
    spread_T: Tensor
    nonfinite_T: Tensor


class StreamingAUC(nn.Module):
    """Training AUC over recent batches, cheap enough for every step: histograms of logits with exponential decay.

        h_tcb <- decay * h_tcb + rows of task t, class c, bin b in this batch
        auc_t = sum over b of h_t1b * (sum over b' < b of h_t0b' + h_t0b / 2) / (h_t1 * h_t0)

    Bins have equal width in the logit, from -range to range, and the outermost are open. With equal width in the
    probability, a task with one positive per thousand would use only the first one or two bins.

    If predictions no longer depend on the input, ``spread_T`` is 0: exactly if the shared layers are dead and each
    logit is its head's bias, otherwise up to rounding. Logits that are not finite are counted separately.

    There is no device synchronisation until the caller reads a value. The cost is one pass over the batch and
    O(T * bins). The histograms are part of the module's checkpoint. They are not buffers, because DDP copies rank 0's
    buffers to all ranks, which would overwrite the histograms of the others.

    Args:
        schema: gives the tasks.
        bins: number of bins.
        logit_range: half the width that the bins cover.
        decay: factor on the histograms per batch. 0.99 is a memory of about 100 batches.

    Raises:
        UserError: bins is below 2, the range is not above 0, or the decay is outside of [0, 1].
    """

    binary_T: Tensor

    def __init__(self, schema: Schema, *, bins: int = 512, logit_range: float = 12.0, decay: float = 0.99) -> None:
        super().__init__()
        if bins < 2 or not logit_range > 0 or not 0 <= decay <= 1:
            raise UserError(
                f"streaming AUC: bins >= 2, logit_range > 0 and 0 <= decay <= 1 are needed, got "
                f"{bins}, {logit_range}, {decay}"
            )
        self.bins, self.logit_range, self.decay = bins, logit_range, decay
        self.register_buffer("binary_T", torch.tensor([t.type == "binary" for t in schema.tasks]), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Sets all histograms to 0."""
        tasks, device = len(self.binary_T), self.binary_T.device
        self._histogram_TCK = torch.zeros(tasks, 2, self.bins, device=device)
        # Of the last batch: squared deviations from its mean, numbers of finite logits, other logits, observed labels,
        # sum of the labels and of their squares.
        self._batch_6T = torch.zeros(6, tasks, device=device)
        self._batch_histogram_TCK = torch.zeros_like(self._histogram_TCK)

    @torch.no_grad()
    def update(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> None:
        """Adds a batch."""
        z, tasks = logits_BT.float(), logits_BT.shape[1]
        finite = z.isfinite()
        finite_T = finite.sum(0)
        z = torch.where(finite, z, 0.0)
        # Relative to the first row, constant logits give exactly 0, whatever the rounding of their mean.
        apart = torch.where(finite, z - z[:1], 0.0)
        mean_T = apart.sum(0) / finite_T.clamp(min=1)
        deviation_T = torch.where(finite, apart - mean_T, 0.0).square().sum(0)
        y_BT = torch.where(mask_BT, labels_BT, 0.0)
        counts = (finite_T, (~finite).sum(0), mask_BT.sum(0))
        self._batch_6T = torch.stack([deviation_T, *counts, y_BT.sum(0), y_BT.square().sum(0)])

        per_unit = self.bins / (2 * self.logit_range)
        bin_BT = ((z + self.logit_range) * per_unit).clamp(0, self.bins - 1).long()
        row_T = 2 * torch.arange(tasks, device=z.device)
        place_BT = (row_T + (labels_BT > 0.5)) * self.bins + bin_BT
        counted_BT = (mask_BT & finite & self.binary_T).float()
        self._batch_histogram_TCK = torch.zeros(tasks, 2, self.bins, device=z.device)
        self._batch_histogram_TCK.view(-1).index_add_(0, place_BT.view(-1), counted_BT.view(-1))
        self._histogram_TCK = self._histogram_TCK.to(z.device).mul_(self.decay).add_(self._batch_histogram_TCK)

    @torch.no_grad()
    def stats(self, *, all_ranks: bool = True) -> StreamingStats:
        """AUC, spread and counts per task, on the device.

        Args:
            all_ranks: join the ranks if ``torch.distributed`` is initialised (one all-reduce, which every rank must
                call), so that all ranks get the same values and make the same decisions.
        """
        device = self.binary_T.device
        parts = self._batch_6T, self._histogram_TCK, self._batch_histogram_TCK
        flat = torch.cat([part.to(device).view(-1) for part in parts])
        if all_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        batch, histograms = flat.split([self._batch_6T.numel(), 2 * self._histogram_TCK.numel()])
        deviation_T, finite_T, nonfinite_T, labels_T, sum_T, square_T = batch.view_as(self._batch_6T)
        negative_2TK, positive_2TK = histograms.view(2, *self._histogram_TCK.shape).unbind(2)
        below_2TK = negative_2TK.cumsum(2) - negative_2TK / 2
        positives_2T = positive_2TK.sum(2)
        # 0 / 0 is nan, as intended for the AUC of one class or of a regression.
        auc_T, batch_auc_T = (positive_2TK * below_2TK).sum(2) / (positives_2T * negative_2TK.sum(2))
        return StreamingStats(
            auc_T=auc_T,
            batch_auc_T=batch_auc_T,
            positives_T=positives_2T[1],
            labels_T=labels_T,
            variance_T=(square_T / labels_T - (sum_T / labels_T).square()).clamp(min=0),
            spread_T=(deviation_T / finite_T).sqrt(),
            nonfinite_T=nonfinite_T,
        )

    def get_extra_state(self) -> Tensor:
        """The histograms, for the checkpoint. A resumed run measures its first batch again."""
        return self._histogram_TCK

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the histograms of a checkpoint."""
        self._histogram_TCK = state.clone()
