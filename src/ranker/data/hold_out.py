"""The hold-out of a log from files: the last days, hours or share of the rows, evaluated and not trained on."""

from __future__ import annotations

import math
import re

from ranker.data.log import Log
from ranker.data.times import DAY_MS, utc
from ranker.errors import UserError

_HOUR_MS = 3_600_000
_HOURS = re.compile(r"(\d+(?:\.\d+)?)\s*h")


def first_held_out(log: Log, *, eval_days: int, hold_out: str | float | None, where: str) -> int:
    """Position of the first row of the hold-out.

    Args:
        log: the log; only its times and number of rows are used.
        eval_days: number of days (UTC) at the end, counted from the last row's day. Used if hold_out is None.
        hold_out: hours before the last row, such as ``6h``, or a share of the rows, such as 0.1.
        where: name of the log, for errors.

    Raises:
        UserError: a value is out of range, or no row is left to train on.
    """
    rows = log.num_rows
    last_ms = log.time_at_row(rows - 1)
    if hold_out is None:
        if not isinstance(eval_days, int) or isinstance(eval_days, bool) or eval_days < 1:
            raise UserError(
                f"eval_days must be a whole number of at least 1, got {eval_days!r}; "
                "data.hold_out takes hours (6h) or a share of the rows (0.1)"
            )
        last_day = last_ms // DAY_MS
        first = log.row_at_time((last_day - eval_days + 1) * DAY_MS)
        what = f"the last {eval_days} days are"
    else:
        hours = _HOURS.fullmatch(hold_out.strip()) if isinstance(hold_out, str) else None
        if hours is not None and float(hours[1]) > 0:
            first = log.row_at_time(last_ms - round(float(hours[1]) * _HOUR_MS) + 1)
        elif isinstance(hold_out, int | float) and not isinstance(hold_out, bool) and 0 < hold_out < 1:
            first = rows - math.ceil(hold_out * rows)
        else:
            raise UserError(
                f"data.hold_out must be hours, such as 6h, or a share of the rows between 0 and 1, got {hold_out!r}"
            )
        what = f"{hold_out} is"
    if first == 0:
        raise UserError(
            f"{where}: {rows:,} rows from {utc(log.time_at_row(0))} to {utc(last_ms)} leave none to train on if {what} "
            "held out; lower eval_days, or give data.hold_out hours (6h) or a share of the rows (0.1)"
        )
    return first
