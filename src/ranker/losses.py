"""The training loss: one masked mean per task over the labels of all ranks, and their weighted sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ranker.data.schema import Schema


class Loss(NamedTuple):
    """A loss and its parts, on the device.

    With several ranks, both values are this rank's share times the number of ranks. Their mean over ranks is the loss.

    Attributes:
        total: scalar to call backward on, sum over tasks of weight_t * loss_t.
        task_T: loss of each task, unweighted and detached. Exactly 0 if no rank observed a label.
    """

    total: Tensor
    task_T: Tensor


def observed_counts(mask_BT: Tensor) -> Tensor:
    """Number of observed labels per task, over the batches of all ranks.

    Args:
        mask_BT: bool, true where the label is observed.

    Returns:
        int64 [T], on the mask's device. Under ``torch.distributed`` this is one all-reduce, so every rank must call it.
    """
    counts_T = mask_BT.sum(0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts_T)
    return counts_T


def best_constants(schema: Schema, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The logit of each task that minimises its loss if every row gets the same one, shape [T].

        binary       log((n_1 + 1) / (n_0 + 1))     n_1, n_0 observed labels of 1 and 0
        regression   sum over observed b of y_b / n

    One label of each kind is added, so that a task without positives keeps finite log odds. A task without labels
    gets 0.

    Args:
        schema: gives each task's type.
        labels_BT: labels, transformed as the loss reads them; any value where not observed.
        mask_BT: bool, true where observed.
    """
    y_BT = torch.where(mask_BT, labels_BT, 0.0).double()
    count_T, sum_T = mask_BT.sum(0), y_BT.sum(0)
    log_odds_T = torch.log((sum_T + 1.0) / (count_T - sum_T + 1.0))
    mean_T = sum_T / count_T.clamp(min=1)
    binary_T = torch.tensor([task.type == "binary" for task in schema.tasks], device=labels_BT.device)
    return torch.where(binary_T, log_odds_T, mean_T).float()


class MultitaskLoss(nn.Module):
    """Log loss for binary tasks, squared error for regressions.

        l_bt   = log(1 + exp(z)) - y z   or   (z - y)^2           z logit, y label
        loss_t = sum over observed b of l_bt / n_t                n_t observed labels of task t over all ranks
        total  = sum over t of weight_t * loss_t

    DDP averages gradients over R ranks. A rank's sum over its own rows, divided by the global n_t, would be R times too
    small, so it is multiplied by R. Averaging the ranks' means instead would give a label on a rank with few labels
    more weight than one on a rank with many.

    An unobserved row does not count, whatever its label or logit. A task without labels does not count. An observed
    logit that is not finite makes the loss not finite, so that a detector sees it. There is no device synchronisation.

    Args:
        schema: gives each task's type and weight.
    """

    binary_at: Tensor
    regression_at: Tensor
    order: Tensor
    weight_T: Tensor

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        binary = [i for i, task in enumerate(schema.tasks) if task.type == "binary"]
        regression = [i for i, task in enumerate(schema.tasks) if task.type == "regression"]
        place = torch.tensor(binary + regression)
        # Not in a checkpoint, because the schema determines them.
        self.register_buffer("binary_at", torch.tensor(binary, dtype=torch.int64), persistent=False)
        self.register_buffer("regression_at", torch.tensor(regression, dtype=torch.int64), persistent=False)
        self.register_buffer("order", torch.argsort(place), persistent=False)
        self.register_buffer("weight_T", torch.tensor([task.weight for task in schema.tasks]), persistent=False)

    def forward(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor, counts_T: Tensor | None = None) -> Loss:
        """Loss of this rank's rows.

        Args:
            logits_BT: the model's output.
            labels_BT: labels, any value where not observed.
            mask_BT: bool, true where observed.
            counts_T: observed labels over all ranks, if the caller has them. Default: ``observed_counts``.
        """
        counts_T = observed_counts(mask_BT) if counts_T is None else counts_T
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return self.local(logits_BT, labels_BT, mask_BT, counts_T=counts_T, ranks=ranks)

    def local(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor, *, counts_T: Tensor, ranks: int = 1) -> Loss:
        """The same without communication: the counts over all ranks and the number of ranks are given."""
        # Unobserved values are replaced by 0 first, because 0 * inf is nan, in the backward pass too.
        z = torch.where(mask_BT, logits_BT.float(), 0.0)
        y = torch.where(mask_BT, labels_BT.float(), 0.0)
        log_loss = F.binary_cross_entropy_with_logits(
            z.index_select(1, self.binary_at), y.index_select(1, self.binary_at), reduction="none"
        )
        log_loss_T = (log_loss * mask_BT.index_select(1, self.binary_at)).sum(0)
        squared_T = (z.index_select(1, self.regression_at) - y.index_select(1, self.regression_at)).square().sum(0)
        sums_T = torch.cat([log_loss_T, squared_T]).index_select(0, self.order)
        task_T = sums_T * (ranks / counts_T.clamp(min=1).to(sums_T.dtype))
        return Loss(total=(task_T * self.weight_T).sum(), task_T=task_T.detach())
