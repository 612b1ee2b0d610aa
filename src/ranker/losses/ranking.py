"""Pairwise and listwise losses of a binary task: they compare rows of the same group, such as a session or a user.

Each stands beside the log loss of its task and never alone, because a ranking loss alone leaves the level of the
logits free, and with it calibration and the divergence detector, which reads the log loss.

    loss_t = pointwise * log loss_t + weight * ranking_t

A group is the rows of a batch with the same key on the same rank. Rows of one key in another batch, or in the share of
another rank, are not compared. ``data.keep_groups`` keeps the rows of a group together where it can.

A row of weight w has the gradient of w equal rows, and the scale of the weights does not matter. Legend: z logit, y
label, w weight, g(i) the group of row i, P_g and N_g the observed rows of a group with label 1 and 0. A group is mixed
if it has both. Sums over i are over all ranks' rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ranker.errors import UserError
from ranker.losses.groups import Groups


class RankingLoss(ABC):
    """A loss over the rows of each group. One of your own is a subclass with ``sums`` and ``denominator``.

        ranking = sum over ranks of sums / sum over ranks of denominator

    Args:
        weight: factor on the ranking loss.
        pointwise: factor on the task's log loss, above 0.
        tasks: names of the binary tasks that get it. None: all binary tasks.

    Raises:
        UserError: a factor is out of range.

    Attributes:
        name: the name under which the loss is recorded: ``train/<task>/<name>``.
    """

    name: ClassVar[str]

    def __init__(self, *, weight: float = 1.0, pointwise: float = 1.0, tasks: Sequence[str] | None = None) -> None:
        if not 0 <= weight < float("inf"):
            raise UserError(f"loss.ranking.weight must be 0 or more, got {weight}")
        if not 0 < pointwise < float("inf"):
            raise UserError(
                f"loss.ranking.pointwise must be above 0, got {pointwise}: a ranking loss alone leaves the level of "
                "the logits free"
            )
        self.weight, self.pointwise = weight, pointwise
        self.tasks = None if tasks is None else list(tasks)

    @abstractmethod
    def sums(self, z_B: Tensor, positive_B: Tensor, negative_B: Tensor, weight_B: Tensor, groups: Groups) -> Tensor:
        """The sum of the loss over this rank's rows, a scalar.

        Args:
            z_B: logits, float32.
            positive_B: bool, true where the label is 1, observed and of a weight above 0.
            negative_B: likewise of label 0.
            weight_B: weights, float32.
            groups: the groups of the rows.
        """

    @abstractmethod
    def denominator(self, positive_B: Tensor, negative_B: Tensor, weight_B: Tensor, groups: Groups) -> Tensor:
        """What the sum over all ranks is divided by: this rank's part, a scalar that does not depend on the logits."""


class _PerPositive(RankingLoss):
    """A mean over the positive rows of mixed groups."""

    def denominator(self, positive_B: Tensor, negative_B: Tensor, weight_B: Tensor, groups: Groups) -> Tensor:
        """Sum over the positive rows i of mixed groups of w_i."""
        return (weight_B * _in_mixed(positive_B, negative_B, groups)).sum()


class BPR(_PerPositive):
    """Pairwise: a positive row should score above each negative one of its group.

        ranking = sum over i in P of mixed groups of w_i mean_j log(1 + exp(z_j - z_i)) / sum over these i of w_i
        mean_j  = mean over the negatives j of g(i), weighted by w_j

    Where a group has more than ``negatives`` negative rows, each positive is compared with that many of them, as they
    stand in the (shuffled) batch, different ones for different positives.

    Args:
        weight: see ``RankingLoss``.
        pointwise: see ``RankingLoss``.
        tasks: see ``RankingLoss``.
        negatives: K, negatives per positive at most. Time and memory are O(B K).

    Raises:
        UserError: a number is out of range.

    Source: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009. There, triples are
        sampled. Here, all pairs of the group in the batch count.
    """

    name = "bpr"

    def __init__(
        self,
        *,
        weight: float = 1.0,
        pointwise: float = 1.0,
        tasks: Sequence[str] | None = None,
        negatives: int = 32,
    ) -> None:
        super().__init__(weight=weight, pointwise=pointwise, tasks=tasks)
        if negatives < 1:
            raise UserError(f"loss.ranking.negatives must be at least 1, got {negatives}")
        self.negatives = negatives

    def sums(self, z_B: Tensor, positive_B: Tensor, negative_B: Tensor, weight_B: Tensor, groups: Groups) -> Tensor:
        """See the class."""
        rows = len(z_B)
        # Rows by group, and in it the negatives first, so that those of a group stand side by side.
        kind_B = torch.where(negative_B, 0, torch.where(positive_B, 1, 2))
        code_B, order_B = (3 * groups.of_B + kind_B).sort(stable=True)
        start_B = torch.searchsorted(code_B, 3 * groups.of_B)
        stop_B = torch.searchsorted(code_B, 3 * groups.of_B, right=True)
        count_B = stop_B - start_B
        place_B = torch.empty_like(order_B).index_put((order_B,), torch.arange(rows, device=z_B.device))
        nth_B = place_B - stop_B  # number of a positive among those of its group
        k_K = torch.arange(min(self.negatives, rows), device=z_B.device)
        step_BK = (nth_B[:, None] * self.negatives + k_K) % count_B.clamp(min=1)[:, None]
        valid_BK = (k_K < count_B[:, None]) & positive_B[:, None]
        other_BK = order_B[torch.where(valid_BK, start_B[:, None] + step_BK, 0)]
        weight_BK = weight_B[other_BK] * valid_BK
        apart_BK = torch.where(valid_BK, z_B[other_BK] - z_B[:, None], 0.0)
        sum_B = (weight_BK * F.softplus(apart_BK)).sum(1)
        total_B = weight_BK.sum(1)
        mean_B = sum_B / torch.where(total_B == 0, 1.0, total_B)
        return (weight_B * _in_mixed(positive_B, negative_B, groups) * mean_B).sum()


class SoftmaxLoss(_PerPositive):
    """Listwise: the positive rows of a group should hold its softmax.

        ranking = - sum over i in P of mixed groups of w_i log p_i / sum over these i of w_i
        p_i     = w_i exp(z_i) / sum over j in g(i) of w_j exp(z_j)

    Source: Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007 (ListNet, top one),
        with one target per positive row.
    """

    name = "softmax"

    def sums(self, z_B: Tensor, positive_B: Tensor, negative_B: Tensor, weight_B: Tensor, groups: Groups) -> Tensor:
        """See the class."""
        wanted_B = _in_mixed(positive_B, negative_B, groups)
        lost_B = _minus_log_softmax(z_B, positive_B | negative_B, weight_B, groups)
        return torch.where(wanted_B, weight_B * lost_B, 0.0).sum()


class JRC(RankingLoss):
    """Joint optimisation of ranking and calibration: the log loss, and a listwise loss for each label.

        loss_t  = alpha * log loss_t + (1 - alpha) * ranking_t
        ranking = - sum over observed i of w_i log p_i / sum over observed i of w_i
        p_i     = w_i exp(l_i[y_i]) / sum over j in g(i) of w_j exp(l_j[y_i])
        l_i[1] = z_i / 2,  l_i[0] = -z_i / 2

    The paper gives each row two logits, l[0] and l[1], with P(y = 1 | x) = sigmoid(l[1] - l[0]). Here a task has one
    logit z, so the two are tied by l[1] = -l[0] = z / 2, which gives the same probability. A row that is alone in its
    group has a ranking loss of 0 and counts in the denominator, as in the paper.

    Args:
        alpha: share of the log loss, above 0 and at most 1.
        tasks: see ``RankingLoss``.

    Raises:
        UserError: alpha is out of range.

    Source: Sheng et al., "Joint Optimization of Ranking and Calibration with Contextualized Hybrid Model", KDD 2023
        (arXiv 2208.06164). The softmax runs over all rows of the context, as there. Some implementations leave out the
        other rows of the same label.
    """

    name = "jrc"

    def __init__(self, *, alpha: float = 0.5, tasks: Sequence[str] | None = None) -> None:
        if not 0 < alpha <= 1:
            raise UserError(f"loss.ranking.alpha must be above 0 and at most 1, got {alpha}")
        super().__init__(weight=1.0 - alpha, pointwise=alpha, tasks=tasks)

    def sums(self, z_B: Tensor, positive_B: Tensor, negative_B: Tensor, weight_B: Tensor, groups: Groups) -> Tensor:
        """See the class."""
        seen_B, half_B = positive_B | negative_B, z_B / 2
        up_B = _minus_log_softmax(half_B, seen_B, weight_B, groups)
        down_B = _minus_log_softmax(-half_B, seen_B, weight_B, groups)
        return torch.where(seen_B, weight_B * torch.where(positive_B, up_B, down_B), 0.0).sum()

    def denominator(self, positive_B: Tensor, negative_B: Tensor, weight_B: Tensor, groups: Groups) -> Tensor:  # noqa: ARG002
        """Sum over the observed rows of w_i."""
        return (weight_B * (positive_B | negative_B)).sum()


def _in_mixed(positive_B: Tensor, negative_B: Tensor, groups: Groups) -> Tensor:
    """True for the positive rows of groups with a negative row."""
    negatives_B = groups.sums(negative_B.float()).index_select(0, groups.of_B)
    return positive_B & (negatives_B > 0)


def _minus_log_softmax(z_B: Tensor, seen_B: Tensor, weight_B: Tensor, groups: Groups) -> Tensor:
    """-log (w_i exp(z_i) / sum over the seen j of g(i) of w_j exp(z_j)) of the seen rows; 0 or more."""
    own_B = z_B + torch.where(seen_B, weight_B, 1.0).log()
    return groups.log_sum_exp(z_B, weight_B, seen_B) - own_B
