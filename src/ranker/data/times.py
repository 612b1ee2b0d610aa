"""The time column: decoding to Unix milliseconds, and checks of unit, order and gaps.

Accepted are numbers in the schema's unit, Arrow timestamps and dates, and ISO 8601 strings. Without a zone, UTC is
meant.
"""

from __future__ import annotations

import datetime as dt

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ranker.data.arrow_types import is_number, is_string
from ranker.data.row_faults import Place
from ranker.data.schema import TIME_UNITS, Schema
from ranker.errors import UserError
from ranker.installation import command_line

Ints = npt.NDArray[np.int64]

DAY_MS = 86_400_000
LONGEST_GAP_MS = 730 * DAY_MS  # published logs have gaps of a year (MovieLens 20M), but not of two

# A time outside of these years has the wrong unit if another unit would put it inside.
_SANE_MS = tuple(int(dt.datetime(year, 1, 1, tzinfo=dt.UTC).timestamp() * 1000) for year in (1990, 2100))
_LARGEST_MS = 250_000_000_000_000  # year 9892: within the calendar of datetime
_ZONE = r"([zZ]|[+-]\d\d(:?\d\d)?)$"  # not found in a plain date, because the day is not followed by anything
_PLAIN_DATE = r"^\d{4}-\d\d-\d\d$"


def is_time(kind: pa.DataType) -> bool:
    """True for the types of a time column."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    exact = pa.types.is_floating(kind) and kind.bit_width == 64  # 32 bits hold today's milliseconds to a minute or two
    return (
        is_string(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_integer(kind) or exact
    )


def times_ms(column: pa.Array, schema: Schema, place: Place) -> Ints:
    """Unix milliseconds, UTC, int64 [B].

    Args:
        column: of a type that ``is_time`` accepts.
        schema: gives the time column and the unit of numbers.
        place: origin of the rows, for errors.

    Raises:
        UserError: a time is null, NaN, no ISO date or out of range. Such a row has no position in the order.
    """
    name, unit = schema.time_column, schema.time_unit
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        raise place.error(name, f"{column.null_count} rows have no time; prepare the log without them")
    if is_string(column.type):
        column, unit = _parsed(column, name, place), "ns"
    elif pa.types.is_date(column.type):
        column, unit = column.cast(pa.timestamp("ms")), "ms"
    elif pa.types.is_timestamp(column.type):
        unit = column.type.unit
    if pa.types.is_floating(column.type):
        raw = column.to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(~np.isfinite(raw))
        if len(wrong):
            raise place.error(
                name, f"{len(wrong)} rows have no time (NaN or infinity), first row {wrong[0]}; drop them"
            )
    else:
        try:
            raw = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise place.error(name, "a time does not fit a 64-bit integer; correct it") from error
    factor = TIME_UNITS[unit]
    far = np.flatnonzero(np.abs(raw.astype(np.float64)) > _LARGEST_MS / factor)
    if len(far):
        wrong_unit = _other_unit(float(raw[far[0]]), schema) if is_number(column.type) else None
        problem = wrong_unit or f"is beyond the year 9892 in '{unit}'; correct it"
        raise place.error(name, f"the time of row {far[0]} ({raw[far[0]]}) {problem}")
    if pa.types.is_floating(column.type):
        return np.rint(raw * factor).astype(np.int64)
    return raw * int(factor) if factor >= 1 else raw // round(1 / factor)


def _parsed(column: pa.Array, name: str, place: Place) -> pa.Array:
    """ISO strings as timestamps in ns. Rows with and without a zone may be mixed."""
    column = column.cast(pa.large_string())
    dates = pc.match_substring_regex(column, pattern=_PLAIN_DATE)
    zoned = pc.and_not(pc.match_substring_regex(column, pattern=_ZONE), dates)
    try:
        if not pc.any(zoned).as_py():
            return column.cast(pa.timestamp("ns"))
        plain = pc.if_else(zoned, None, column).cast(pa.timestamp("ns")).cast(pa.int64())
        other = pc.if_else(zoned, column, None).cast(pa.timestamp("ns", tz="UTC")).cast(pa.int64())
        return pc.coalesce(plain, other).cast(pa.timestamp("ns"))
    except pa.ArrowInvalid as error:
        row = next((i for i in range(len(column)) if not _parses(column[i : i + 1])), 0)
        raise place.error(
            name, f"row {row}: {column[row].as_py()!r} is no time; write ISO 8601, such as 2026-11-23T08:30:00Z"
        ) from error


def _parses(one: pa.Array) -> bool:
    for kind in (pa.timestamp("ns"), pa.timestamp("ns", tz="UTC")):
        try:
            one.cast(kind)
        except pa.ArrowInvalid:
            continue
        return True
    return False


def _other_unit(raw: float, schema: Schema) -> str | None:
    """What is wrong with a number outside of 1990 .. 2100. None if no other unit would put it inside."""
    low, high = _SANE_MS
    for unit, factor in TIME_UNITS.items():
        if unit != schema.time_unit and low <= raw * factor < high:
            return (
                f"is not in 1990 .. 2100 in '{schema.time_unit}', but is in '{unit}'; set time_unit: {unit} in the "
                "schema, or write all files in one unit"
            )
    return None


def check_time_units(time_min_ms: Ints, time_max_ms: Ints, *, places: list[Place], schema: Schema) -> None:
    """Checks that the first and last time of every row group are plausible in the schema's unit.

    Args:
        time_min_ms: first time of each row group, if the schema's unit is right.
        time_max_ms: last time of each row group.
        places: the row groups. Their times are numbers.
        schema: gives the time column and its unit.

    Raises:
        UserError: a time lies outside of 1990 .. 2100 and another unit would put it inside, or all of them look like
            dates written as numbers (20261123).
    """
    low, high = _SANE_MS
    scale = TIME_UNITS[schema.time_unit]
    for times in (time_min_ms, time_max_ms):
        for group in np.flatnonzero((times < low) | (times >= high)).tolist():
            raw = times[group] / scale
            wrong_unit = _other_unit(raw, schema)
            if wrong_unit:
                raise UserError(f"{places[group].file}: column '{schema.time_column}' ({raw:.0f}) {wrong_unit}")
    if len(places) and all(_is_written_date(round(t / scale)) for t in (time_min_ms[0], time_max_ms[-1])):
        raise UserError(
            f"{places[0].file}: column '{schema.time_column}' ({round(time_min_ms[0] / scale)}) looks like a date "
            "written as a number; write it as a date, a timestamp or an ISO string"
        )


def _is_written_date(number: int) -> bool:
    try:
        return 1990 <= dt.date(number // 10_000, number // 100 % 100, number % 100).year < 2100
    except (ValueError, OverflowError):
        return False


def check_sorted(time_ms_B: Ints, *, schema: Schema, place: Place, url: str) -> None:
    """Checks that the rows of a row group are in time order. ``url`` is the log's folder, for the error.

    Raises:
        UserError: a row is earlier than the one before it. The line names the first such row.
    """
    earlier = np.flatnonzero(time_ms_B[1:] < time_ms_B[:-1])
    if len(earlier):
        row = int(earlier[0]) + 1
        raise place.error(
            schema.time_column,
            f"row {row} is earlier than the row before it; sort the log by '{schema.time_column}': {sorting(url)}",
        )


def sorting(url: str) -> str:
    """The command that sorts a log."""
    return f"{command_line('prepare')} rewrite {url} NEW_FOLDER"


def check_groups_in_order(
    time_min_ms: Ints, time_max_ms: Ints, *, places: list[Place], schema: Schema, url: str
) -> None:
    """Checks that no row group begins before the previous one ends, over all files of the folder ``url``.

    Raises:
        UserError: one does.
    """
    early = np.flatnonzero(time_min_ms[1:] < time_max_ms[:-1])
    if len(early):
        here, before = places[early[0] + 1], places[early[0]]
        raise here.error(
            schema.time_column,
            f"begins before row group {before.row_group} of {before.file} ends; sort the log by "
            f"'{schema.time_column}' over all files, so that their times do not overlap: {sorting(url)}",
        )


def check_gap(before_ms: int, after_ms: int, *, schema: Schema, place: Place, what: str) -> None:
    """Checks that two neighbours in time order are not years apart.

    Args:
        before_ms: the earlier time.
        after_ms: the later one.
        schema: gives the time column.
        place: origin of the later time.
        what: name of the later time, the start of a phrase: "row 3 is at".

    Raises:
        UserError: they are more than LONGEST_GAP_MS apart. One of the two is most likely wrong.
    """
    if after_ms - before_ms > LONGEST_GAP_MS:
        raise place.error(
            schema.time_column,
            f"{what} {utc(after_ms)}, {(after_ms - before_ms) // DAY_MS:,} days after the time before it "
            f"({utc(before_ms)}); correct the times, or leave rows out with data.days=[FIRST,LAST]",
        )


def utc(time_ms: int) -> str:
    """A time for people, to the second."""
    moment = dt.datetime(1970, 1, 1) + dt.timedelta(milliseconds=int(time_ms))
    return moment.isoformat(sep=" ", timespec="seconds")
