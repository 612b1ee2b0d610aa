"""Metrics per task: exact ones for evaluation, a running AUC for training, and those that ``metrics=`` adds."""

from ranker.metrics.concordance import XAUC
from ranker.metrics.grouped import MRR, NDCG, GroupAUC, Recall
from ranker.metrics.pointwise import MAE
from ranker.metrics.row_metric import GroupedMetric, RowMetric, Table
from ranker.metrics.rows import Ranked, TaskRows
from ranker.metrics.segments import CalibrationBuckets, SegmentedNE
from ranker.metrics.statistic import Fixed, Intervals, Statistic, Sums, Weighted
from ranker.metrics.streaming_auc import StreamingAUC, StreamingStats
from ranker.metrics.task_metrics import TaskMetrics

__all__ = [
    "MAE",
    "MRR",
    "NDCG",
    "XAUC",
    "CalibrationBuckets",
    "Fixed",
    "GroupAUC",
    "GroupedMetric",
    "Intervals",
    "Ranked",
    "Recall",
    "RowMetric",
    "SegmentedNE",
    "Statistic",
    "StreamingAUC",
    "StreamingStats",
    "Sums",
    "Table",
    "TaskMetrics",
    "TaskRows",
    "Weighted",
]
