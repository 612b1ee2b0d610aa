"""Metrics by task: exact ones for evaluation, and a cheap running AUC for training."""

from __future__ import annotations

from ranker.metrics.streaming import StreamingAUC, StreamingStats
from ranker.metrics.task_metrics import TaskMetrics

__all__ = ["StreamingAUC", "StreamingStats", "TaskMetrics"]
