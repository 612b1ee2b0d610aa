"""What becomes a row of metrics.csv: the numbers of a training step, and those of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ranker.data.schema import Schema
from ranker.runs import metric_names as names


def step_values(schema: Schema, losses: Sequence[float], aucs: Sequence[float], lr: float) -> dict[str, float]:
    """The numbers of a training step, by the names of metrics.csv.

    Args:
        schema: the tasks.
        losses: unweighted loss of each task.
        aucs: streaming AUC of each task.
        lr: learning rate of the next step.
    """
    values = {names.TRAIN_LOSS: sum(task.weight * x for task, x in zip(schema.tasks, losses, strict=True))}
    values[names.LEARNING_RATE] = lr
    for task, loss, auc in zip(schema.tasks, losses, aucs, strict=True):
        if loss:  # exactly 0: no row of the batch has a label of this task
            values[names.task_metric(names.TRAIN, task.name, "loss")] = loss
        if task.type == "binary":
            values[names.task_metric(names.TRAIN, task.name, "auc")] = auc
    return values


def over_time(phase: str, values: Mapping[str, float]) -> dict[str, float]:
    """Metrics worth a column over time. The counts of the last evaluation are in summary.json."""
    return {f"{phase}/{name}": v for name, v in values.items() if not name.endswith(("/observed", "/nonfinite"))}
