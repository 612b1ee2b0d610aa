"""The training loss: one masked mean per task over the labels of all ranks, and their weighted sum.

Where the schema has row weights, every mean is weighted. Without them, no operation differs from an unweighted mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ranker.data.schema import Schema
from ranker.errors import UserError, suggest
from ranker.losses.groups import Groups
from ranker.losses.ranking import RankingLoss


class Loss(NamedTuple):
    """A loss and its parts, on the device.

    With several ranks, all values are this rank's share times the number of ranks. Their mean over ranks is the loss.

    Attributes:
        total: scalar to call backward on, sum over tasks of weight_t * loss_t.
        task_T: log loss or squared error of each task, without any factor, detached. Exactly 0 if no rank observed a
            label.
        ranking_T: ranking loss of each task, likewise; 0 for a task that has none. None without a ranking loss.
    """

    total: Tensor
    task_T: Tensor
    ranking_T: Tensor | None = None


def observed_counts(mask_BT: Tensor) -> Tensor:
    """Number of observed labels per task, over the batches of all ranks.

    Args:
        mask_BT: bool, true where the label is observed.

    Returns:
        int64 [T], on the mask's device. Under ``torch.distributed`` this is one all-reduce, so every rank must call it.
    """
    return _over_ranks(mask_BT.sum(0))


def _over_ranks(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def best_constants(schema: Schema, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """The logit of each task that minimises its loss if every row gets the same one, shape [T].

        binary       log((n_1 + 1) / (n_0 + 1))     n_1, n_0 observed labels of 1 and 0
        regression   sum over observed b of y_b / n

    One label of each kind is added, so that a task without positives keeps finite log odds. A task without labels
    gets 0. With weights, n_1, n_0, n and the sum are weighted, with the weights scaled to a mean of 1. Where a share q
    of the negatives was kept, log q is added.

    Args:
        schema: gives each task's type.
        labels_BT: labels, transformed as the loss reads them; any value where not observed.
        mask_BT: bool, true where observed.
        weight_B: weights of the rows; None: 1.
    """
    y_BT = torch.where(mask_BT, labels_BT, 0.0).double()
    count_T, sum_T = mask_BT.sum(0), y_BT.sum(0)
    if weight_B is not None:
        w_BT = mask_BT * weight_B.double()[:, None]
        scale_T = count_T / w_BT.sum(0).clamp(min=1e-300)
        sum_T = (y_BT * w_BT).sum(0) * scale_T
    log_odds_T = torch.log((sum_T + 1.0) / (count_T - sum_T + 1.0))
    mean_T = sum_T / count_T.clamp(min=1)
    binary_T = torch.tensor([task.type == "binary" for task in schema.tasks], device=labels_BT.device)
    found_T = torch.where(binary_T, log_odds_T, mean_T).float()
    offset_T = sampling_offsets(schema)
    return found_T if offset_T is None else found_T - offset_T.to(found_T.device)


def sampling_offsets(schema: Schema) -> Tensor | None:
    """What is added to a logit of the whole log to get that of the rows that were kept, -log q [T]; None for all 0.

    Of a log that keeps each negative row with probability q and each positive one,

        P(1 | x, kept) = p / (p + (1 - p) q),    so    logit(P) = logit(p) - log q

    With this offset in the loss, the model learns logit(p) itself. The usual correction p = P / (P + (1 - P) / q) of
    the scores gives the same p, but has to be made wherever a score is used.

    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook (ADKDD 2014), section 6.3; King and
        Zeng, Logistic Regression in Rare Events Data (Political Analysis, 2001).
    """
    rates = [task.negative_keep_rate for task in schema.tasks]
    return None if all(rate == 1 for rate in rates) else -torch.tensor(rates).double().log().float()


class MultitaskLoss(nn.Module):
    """Log loss for binary tasks, squared error for regressions.

        l_bt   = log(1 + exp(z)) - y z   or   (z - y)^2           z logit (plus -log q, if a share q of the negatives
                                                                  was kept), y label
        loss_t = sum over observed b of w_b l_bt / n_t            w row weight (1 without), n_t = sum of w over the
                                                                  observed labels of task t of all ranks
        total  = sum over t of weight_t * loss_t

    DDP averages gradients over R ranks. A rank's sum over its own rows, divided by the global n_t, would be R times too
    small, so it is multiplied by R. Averaging the ranks' means instead would give a label on a rank with few labels
    more weight than one on a rank with many.

    With a ranking loss, total has weight_t * (pointwise * loss_t + factor * ranking_t) for the tasks that it is for.
    The ranking loss has its own denominator over all ranks (``ranker.losses.ranking``).

    An unobserved row does not count, whatever its label or logit. A task without labels does not count. An observed
    logit that is not finite makes the loss not finite, so that a detector sees it. There is no device synchronisation.

    Args:
        schema: gives each task's type, weight and group.
        ranking: a ranking loss for binary tasks; None for none.

    Raises:
        UserError: the ranking loss is for a task that is not there or no binary one, or the schema has no group.
    """

    binary_at: Tensor
    regression_at: Tensor
    order: Tensor
    weight_T: Tensor
    ranked_T: Tensor
    offset_T: Tensor | None

    def __init__(self, schema: Schema, ranking: RankingLoss | None = None) -> None:
        super().__init__()
        self.ranking = ranking
        self._ranked: dict[int, int] = {} if ranking is None else _ranked_tasks(schema, ranking)
        binary = [i for i, task in enumerate(schema.tasks) if task.type == "binary"]
        regression = [i for i, task in enumerate(schema.tasks) if task.type == "regression"]
        place = torch.tensor(binary + regression)
        # Not in a checkpoint, because the schema determines them.
        self.register_buffer("binary_at", torch.tensor(binary, dtype=torch.int64), persistent=False)
        self.register_buffer("regression_at", torch.tensor(regression, dtype=torch.int64), persistent=False)
        is_ranked = [at in self._ranked for at in range(len(schema.tasks))]
        self.register_buffer("ranked_T", torch.tensor(is_ranked), persistent=False)
        self.register_buffer("order", torch.argsort(place), persistent=False)
        self.register_buffer("offset_T", sampling_offsets(schema), persistent=False)
        self.register_buffer("weight_T", torch.tensor([task.weight for task in schema.tasks]), persistent=False)

    def forward(
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        counts_T: Tensor | None = None,
        *,
        weight_B: Tensor | None = None,
        groups_BG: Tensor | None = None,
    ) -> Loss:
        """Loss of this rank's rows.

        Args:
            logits_BT: the model's output.
            labels_BT: labels, any value where not observed.
            mask_BT: bool, true where observed.
            counts_T: ``counts`` summed over all ranks, if the caller has them. Default: the ranks sum them here, and
                all must call.
            weight_B: weights of the rows; None: 1.
            groups_BG: keys of the rows' groups, which a ranking loss needs.
        """
        if counts_T is None:
            counts_T = _over_ranks(self.counts(labels_BT, mask_BT, weight_B=weight_B, groups_BG=groups_BG))
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return self.local(
            logits_BT, labels_BT, mask_BT, counts_T=counts_T, ranks=ranks, weight_B=weight_B, groups_BG=groups_BG
        )

    def counts(
        self,
        labels_BT: Tensor,
        mask_BT: Tensor,
        *,
        weight_B: Tensor | None = None,
        groups_BG: Tensor | None = None,
    ) -> Tensor:
        """What this rank's rows add to the denominators: observed labels of each task, or the sum of their weights.

        Returns:
            [T], int64 without weights and float64 with them. With a ranking loss float64 [2, T]: its denominators in
            the second row.
        """
        counts_T = (mask_BT if weight_B is None else mask_BT * weight_B.double()[:, None]).sum(0)
        if not self._ranked:
            return counts_T
        assert self.ranking is not None
        found_T = torch.zeros_like(counts_T, dtype=torch.float64)
        for task, rows in self._ranked_rows(labels_BT, mask_BT, weight_B, groups_BG):
            found_T[task] = self.ranking.denominator(*rows)
        return torch.stack([counts_T.double(), found_T])

    def local(
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        *,
        counts_T: Tensor,
        ranks: int = 1,
        weight_B: Tensor | None = None,
        groups_BG: Tensor | None = None,
    ) -> Loss:
        """The same without communication: the counts over all ranks and the number of ranks are given."""
        # Unobserved values are replaced by 0 first, because 0 * inf is nan, in the backward pass too.
        z = torch.where(mask_BT, self.of_kept_rows(logits_BT.float()), 0.0)
        y = torch.where(mask_BT, labels_BT.float(), 0.0)
        log_loss = F.binary_cross_entropy_with_logits(
            z.index_select(1, self.binary_at), y.index_select(1, self.binary_at), reduction="none"
        )
        log_loss = log_loss * mask_BT.index_select(1, self.binary_at)
        squared = (z.index_select(1, self.regression_at) - y.index_select(1, self.regression_at)).square()
        if weight_B is not None:
            log_loss, squared = log_loss * weight_B[:, None], squared * weight_B[:, None]
        sums_T = torch.cat([log_loss.sum(0), squared.sum(0)]).index_select(0, self.order)
        own_T = counts_T[0] if self._ranked else counts_T
        task_T = sums_T * (ranks / _at_least_one(own_T).to(sums_T.dtype))
        if not self._ranked:
            return Loss(total=(task_T * self.weight_T).sum(), task_T=task_T.detach())
        factor_T = ranks / _at_least_one(counts_T[1])
        ranking_T = self._ranking(z, labels_BT, mask_BT, weight_B, groups_BG, factor_T)
        total_T = self.combined(task_T, ranking_T)
        return Loss(total=(total_T * self.weight_T).sum(), task_T=task_T.detach(), ranking_T=ranking_T.detach())

    def of_kept_rows(self, logits_BT: Tensor) -> Tensor:
        """The logits on the rows that were kept, from those of the whole log; see ``sampling_offsets``."""
        return logits_BT if self.offset_T is None else logits_BT + self.offset_T

    def combined(self, task_T: Tensor, ranking_T: Tensor) -> Tensor:
        """What is minimised of each task, before task weights: pointwise * loss_t + factor * ranking_t, or loss_t."""
        assert self.ranking is not None
        both_T = self.ranking.pointwise * task_T + self.ranking.weight * ranking_T
        return torch.where(self.ranked_T.to(task_T.device), both_T, task_T)

    def _ranking(
        self,
        z_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor | None,
        groups_BG: Tensor | None,
        factor_T: Tensor,
    ) -> Tensor:
        """This rank's share of the ranking loss of each task, [T]; 0 for a task that has none."""
        assert self.ranking is not None
        found = [z_BT.new_zeros(())] * z_BT.shape[1]
        for task, rows in self._ranked_rows(labels_BT, mask_BT, weight_B, groups_BG):
            found[task] = self.ranking.sums(z_BT[:, task], *rows) * factor_T[task].to(z_BT.dtype)
        return torch.stack(found)

    def _ranked_rows(
        self, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor | None, groups_BG: Tensor | None
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor, Groups]]]:
        """Of each task with a ranking loss: its place, its positive and negative rows, the weights and the groups."""
        if groups_BG is None:
            raise UserError("a ranking loss needs rows with a group; name a column under groups: in the schema")
        weight_B = torch.ones_like(labels_BT[:, 0]) if weight_B is None else weight_B
        groups = {column: Groups.of(groups_BG[:, column]) for column in set(self._ranked.values())}
        for task, column in self._ranked.items():
            seen_B, positive_B = mask_BT[:, task] & (weight_B > 0), labels_BT[:, task] > 0.5
            yield task, (seen_B & positive_B, seen_B & ~positive_B, weight_B, groups[column])


def _at_least_one(counts_T: Tensor) -> Tensor:
    """The counts, or 1 where nothing is counted. Sums of weights may be below 1."""
    return torch.where(counts_T > 0, counts_T, 1.0) if counts_T.is_floating_point() else counts_T.clamp(min=1)


def _ranked_tasks(schema: Schema, ranking: RankingLoss) -> dict[int, int]:
    """Places of the tasks with a ranking loss, and the place of the group of each."""
    known = [task.name for task in schema.tasks if task.type == "binary"]
    for name in ranking.tasks or ():
        if name not in known:
            raise UserError(f"loss.ranking.tasks: '{name}' is no binary task; {suggest(name, known)}")
    if not schema.groups:
        raise UserError(
            f"loss={ranking.name} compares rows of the same group, but schema '{schema.name}' has none; add "
            "groups: [{name: user, column: user_id}]"
        )
    chosen = known if ranking.tasks is None else ranking.tasks
    if not chosen:
        raise UserError(f"loss={ranking.name} ranks by binary tasks, and none is trained; use loss=pointwise")
    return {
        at: schema.group_names.index(schema.group_of(task))
        for at, task in enumerate(schema.tasks)
        if task.name in chosen
    }
