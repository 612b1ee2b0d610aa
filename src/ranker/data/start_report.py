"""What a run is about to train on, in one line, and warnings before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ranker.data.batch import Batch
from ranker.data.datamodule import RankingDataModule
from ranker.data.inspection import leak_suspects
from ranker.data.log import Log
from ranker.data.schema import Schema
from ranker.data.times import DAY_MS, utc
from ranker.errors import UserError

_SAMPLE = 16_384  # rows whose labels are looked at
_LEAK_SAMPLE = 4096  # rows on which features are compared with labels, a tenth of a second for 60 features
_FEW_STEPS = 200
_FEW_HELD_OUT = 200


@dataclass(frozen=True)
class StartReport:
    """What is said before the first step.

    Attributes:
        line: rows, days, hold-out, base rates, parameters and steps.
        warnings: one line each.
    """

    line: str
    warnings: Sequence[str]


def start_report(
    data: RankingDataModule,
    *,
    parameters: Mapping[str, int],
    steps: int,
    limited: bool = False,
    warmup: int = 0,
    options: Sequence[str] = (),
) -> StartReport:
    """Looks at the first training rows and the first rows of the hold-out, which the run reads anyway.

    Args:
        data: the data of a run that has not begun.
        parameters: number of parameters by kind.
        steps: steps that the run is going to make.
        limited: whether it ends before the last training row because the user said so.
        warmup: steps over which the learning rate rises.
        options: dotted options that exist, of which warnings may recommend some.

    Raises:
        UserError: there is no training row, or none of them has a label of any task.
    """
    log, plan = data.log, data.plan
    if log.train_rows == 0:
        raise UserError("the log has no rows to train on; give it more rows or hold out fewer")
    first = log.read(0, min(log.train_rows, _SAMPLE, plan.rows(0)[1]))
    if not first.mask_BT.any():
        _search_label(log, len(first))
    held_out = log.num_rows - log.train_rows
    warnings = [
        *log.schema.label_features(),
        *leak_suspects([first.slice(0, _LEAK_SAMPLE)], log.schema),
        *_unlabelled(first, log.schema, "training"),
        *_held_out(log, held_out, options),
    ]
    if steps < _FEW_STEPS and not limited:
        more = " or more passes (train.epochs)" if "train.epochs" in options else ""
        warnings.append(f"{steps} steps are few: use a smaller scale.batch_size{more}")
    if 0 < steps <= warmup:
        warnings.append(
            f"the learning rate rises over {warmup} steps and the run has {steps}, so it ends at {steps / warmup:.0%} "
            "of its full value; lower train.warmup_steps"
        )
    begin, last = log.time_at_row(0), log.time_at_row(log.train_rows - 1)
    days = last // DAY_MS - begin // DAY_MS + 1
    of = f", hold-out {held_out:,} rows from {utc(log.time_at_row(log.train_rows))}" if held_out else ", no hold-out"
    line = (
        f"{log.train_rows:,} training rows in {days:,} {'day' if days == 1 else 'days'} from {utc(begin)}{of}; "
        f"labels of the first {len(first):,} rows: {', '.join(_rates(first, log.schema))}; "
        f"parameters: {', '.join(f'{number:,} {kind}' for kind, number in parameters.items())}; "
        f"{steps:,} steps to come"
    )
    return StartReport(line, warnings)


def _search_label(log: Log, start: int) -> None:
    """Reads on until a row has a label.

    Raises:
        UserError: no training row has one.
    """
    while start < log.train_rows:
        stop = min(start + 4 * _SAMPLE, log.train_rows)
        if log.read(start, stop).mask_BT.any():
            return
        start = stop
    bad = f" ({log.num_bad_rows:,} rows cannot be used)" if log.num_bad_rows else ""
    names = ", ".join(f"'{task.column}'" for task in log.schema.tasks)
    raise UserError(
        f"none of the {log.train_rows:,} training rows has a label{bad}: the columns {names} are null, masked out or "
        "in rows that are dropped; scripts/inspect_data.py DIR says more"
    )


def _held_out(log: Log, rows: int, options: Sequence[str]) -> list[str]:
    warnings = []
    if rows < _FEW_HELD_OUT:
        more = ", for example with data.hold_out=0.1, a tenth of the rows" if "data.hold_out" in options else ""
        warnings.append(f"the hold-out has {rows:,} rows, so its metrics say little; hold out more{more}")
    if rows:
        batch = log.read(log.train_rows, log.train_rows + min(rows, _SAMPLE))
        warnings += _unlabelled(batch, log.schema, "hold-out")
    return warnings


def _unlabelled(rows: Batch, schema: Schema, what: str) -> list[str]:
    observed = rows.mask_BT.any(dim=0).tolist()
    return [
        f"task '{task.name}' has no label in the first {len(rows):,} {what} rows (column '{task.column}')"
        for task, labelled in zip(schema.tasks, observed, strict=True)
        if not labelled
    ]


def _rates(rows: Batch, schema: Schema) -> list[str]:
    found = []
    for t, task in enumerate(schema.tasks):
        labels = rows.labels_BT[:, t].numpy()[rows.mask_BT[:, t].numpy()].astype(np.float64)
        kind = "{:.2%}" if task.type == "binary" else "mean {:.4g}"
        found.append(f"{task.name} {kind.format(labels.mean()) if len(labels) else 'none'}")
    return found
