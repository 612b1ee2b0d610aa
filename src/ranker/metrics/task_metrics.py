"""Exact metrics per task for evaluation, over the rows of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.errors import UserError, suggest
from ranker.metrics.pointwise import Standard
from ranker.metrics.row_metric import RowMetric, Table
from ranker.metrics.rows import TaskRows
from ranker.metrics.state import Kept, State
from ranker.metrics.statistic import Intervals, Statistic

NAN = math.nan


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

    Where the schema has row weights, every metric is weighted: a row of weight w counts like w equal rows. ``observed``
    is the number of rows all the same. Where a share q of a task's negatives was kept, each of them has weight 1 / q,
    so that metrics are those of the whole log, up to chance.

    Memory on each rank, per row of all ranks: 5 bytes for each binary task. Other metrics add 8 bytes for each group
    and each regression that they need, 4 for each feature, and weights add 4. While one task is computed, there are
    about 250 bytes per row more, in host memory.

    Args:
        schema: gives names and types of the tasks.
        extra: more metrics, see ``RowMetric``.
        intervals: confidence intervals, computed by ``compute(final=True)``. None: none.

    Raises:
        UserError: a metric needs a group or a feature that the schema does not have.

    Attributes:
        notes: after ``compute``, the reason for each metric that is nan.
        tables: after ``compute(final=True)``, the tables of the metrics.
        intervals: after ``compute(final=True)``, the ends of the confidence interval of each metric that has one.

    Source: AUC by ``torchmetrics.functional.classification.binary_auroc``; normalised entropy by He et al. (2014),
        Practical Lessons from Predicting Clicks on Ads at Facebook; AUC and RMSE are those of Tang et al. (2023),
        Table 2.
    """

    def __init__(self, schema: Schema, *, extra: Sequence[RowMetric] = (), intervals: Intervals | None = None) -> None:
        super().__init__()
        self.notes: dict[str, str] = {}
        self.tables: list[Table] = []
        self.intervals: dict[str, tuple[float, float]] = {}
        self._schema, self._extra = schema, list(extra)
        self._resampling = intervals if intervals is not None and intervals.resamples else None
        self.state = State(schema.tasks, self._kept(schema))

    def names(self) -> list[str]:
        """Names of the metrics that ``extra`` adds, by ``<task>/<metric>``."""
        pairs = [(task, metric) for task in self._schema.tasks for metric in self._extra if task.type in metric.types]
        return [f"{task.name}/{name}" for task, metric in pairs for name in metric.names(self._schema, task)]

    def add(self, logits_BT: Tensor, batch: Batch) -> None:
        """Adds the rows of a batch, without a device synchronisation.

        Args:
            logits_BT: the model's output.
            batch: the rows, on the same device.
        """
        self._add(logits_BT, batch.labels_BT, batch.mask_BT, batch.weight_B, batch.groups_BG, batch.onehot_BC)

    def update(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> None:
        """Adds rows without weights, groups or features.

        Args:
            logits_BT: the model's output.
            labels_BT: transformed labels, any value where not observed.
            mask_BT: bool, true where observed.
        """
        self._add(logits_BT, labels_BT, mask_BT, None, None, None)

    def compute(self, *, final: bool = False) -> dict[str, float]:
        """All metrics of the rows since the last reset, by ``<task>/<metric>``. Joins the ranks.

        Args:
            final: compute tables and intervals as well.
        """
        if not self.state.update_called:
            # A rank without rows still takes part in the collectives, with empty state.
            device = self.state.observed.device
            nothing = torch.zeros(0, len(self.state.observed), device=device)
            keys = torch.zeros(0, len(self._schema.groups), dtype=torch.int64, device=device)
            ids = torch.zeros(0, len(self._schema.one_hot), dtype=torch.int64, device=device)
            self._add(nothing, nothing, nothing.bool(), nothing.new_zeros(0), keys, ids)
        # torchmetrics keeps what it computed, so the values are copied before more are added.
        computed, notes, columns = self.state.compute()
        values, self.notes = dict(computed), dict(notes)
        self.tables, self.intervals = [], {}
        if self._extra or (final and self._resampling):
            for at in range(len(self._schema.tasks)):
                self._of_task(at, columns, values, final=final)
        return values

    def reset(self) -> None:
        """Removes all rows."""
        self.state.reset()
        self.notes, self.tables, self.intervals = {}, [], {}

    def _kept(self, schema: Schema) -> Kept:
        """What must be kept of each row. A metric's mistakes are found here, before a row is read."""
        types = {task.type for task in schema.tasks}
        used = [metric for metric in self._extra if types & set(metric.types)]
        groups = {name for metric in used for name in metric.groups(schema)}
        if self._resampling is not None:
            by = self._resampling.by
            if by is not None and by not in schema.group_names:
                raise UserError(f"metrics.intervals.by: no group '{by}'; {suggest(by, schema.group_names)}")
            groups |= {name for name in (by, *schema.group_names[:1]) if name}
        return Kept(
            rows=bool(self._extra) or self._resampling is not None,
            weights=bool(schema.weight),
            regressions="regression" in types
            and (self._resampling is not None or any("regression" in metric.types for metric in used)),
            groups=tuple(name for name in schema.group_names if name in groups),
            features=tuple(dict.fromkeys(name for metric in used for name in metric.features(schema))),
        )

    def _add(
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor | None,
        groups_BG: Tensor | None,
        onehot_BC: Tensor | None,
    ) -> None:
        kept, schema = self.state.kept, self._schema
        for what, needed, given in (
            ("a weight", kept.weights, weight_B),
            ("groups", kept.groups, groups_BG),
            ("features", kept.features, onehot_BC),
        ):
            if needed and given is None:
                raise UserError(f"metrics need rows with {what}; the log of schema '{schema.name}' gives none")
        one_hot = [feature.name for feature in schema.one_hot]
        keys = [schema.group_names.index(name) for name in kept.groups]
        ids = [one_hot.index(name) for name in kept.features]
        self.state.update(
            logits_BT,
            labels_BT,
            mask_BT,
            weight_B,
            groups_BG[:, keys] if keys and groups_BG is not None else None,
            onehot_BC[:, ids] if ids and onehot_BC is not None else None,
        )

    def _of_task(self, at: int, columns: Mapping[str, Any], values: dict[str, float], *, final: bool) -> None:
        """The metrics that are computed from rows, of one task."""
        task = self._schema.tasks[at]
        used = [metric for metric in self._extra if task.type in metric.types]
        names = [name for metric in used for name in metric.names(self._schema, task)]
        trouble = "no row has an observed label" if not values[f"{task.name}/observed"] else ""
        if values[f"{task.name}/nonfinite"]:
            trouble = "predictions are not finite"
        if trouble:
            values |= {f"{task.name}/{name}": NAN for name in names}
            self.notes |= {f"{task.name}/{name}": trouble for name in names}
            return
        rows = self._rows(at, columns)
        found: dict[str, Statistic] = {}
        for metric in used:
            found |= metric.statistics(rows)
        for name in names:
            value = values[f"{task.name}/{name}"] = found[name].value
            if math.isnan(value):
                self.notes[f"{task.name}/{name}"] = found[name].note or "it is undefined on these rows"
        if not final:
            return
        for metric in used:
            self.tables += metric.tables(rows, self._schema)
        if self._resampling is not None:
            by = self._resampling.by or next(iter(self._schema.group_names), None)
            ends = self._resampling.of({**Standard().statistics(rows), **found}, rows, by=by)
            self.intervals |= {f"{task.name}/{name}": interval for name, interval in ends.items()}

    def _rows(self, at: int, columns: Mapping[str, Any]) -> TaskRows:
        """The observed rows of a task."""
        schema, kept = self._schema, self.state.kept
        task = schema.tasks[at]
        place = sum(other.type == task.type for other in schema.tasks[:at])
        if task.type == "binary":
            z_N, y_N = columns["logits"][:, place], columns["labels"][:, place]
            seen = np.flatnonzero(y_N >= 0)
        else:
            z_N, y_N = columns["values"][:, place], columns["targets"][:, place]
            seen = np.flatnonzero(~np.isnan(y_N))
        w_N = columns["weights"][seen].astype(np.float64) if kept.weights else np.ones(len(seen))
        if task.negative_keep_rate != 1:
            w_N = np.where(y_N[seen] < 0.5, w_N / task.negative_keep_rate, w_N)
        return TaskRows(
            task=task,
            z_N=z_N[seen],
            y_N=y_N[seen].astype(np.float32),
            w_N=w_N,
            keys={name: columns["keys"][seen, i] for i, name in enumerate(kept.groups)},
            features={name: columns["ids"][seen, i].astype(np.int64) for i, name in enumerate(kept.features)},
        )
