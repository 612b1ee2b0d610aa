"""Training losses: a masked mean per task over the labels of all ranks, and losses that rank rows inside a group."""

from ranker.losses.multitask import Loss, MultitaskLoss, best_constants, observed_counts
from ranker.losses.ranking import BPR, JRC, RankingLoss, SoftmaxLoss

__all__ = [
    "BPR",
    "JRC",
    "Loss",
    "MultitaskLoss",
    "RankingLoss",
    "SoftmaxLoss",
    "best_constants",
    "observed_counts",
]
