"""Raw columns made into those of a log: texts to numbers, booleans and times, whatever their format."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from ranker.data.column_profile import FALSE, GROUPED, NUMBER, TRUE
from ranker.data.schema import TIME_UNITS, Schema

# Formats of a time, in the order in which they are tried. The first group is ISO 8601 and may be mixed in a column.
ISO = (
    *("%Y-%m-%dT%H:%M:%S%.f%z", "%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%d %H:%M:%S%.f %z"),
    *("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M", "%Y-%m-%d"),
)
OTHER = tuple(
    f"{day}{clock}"
    for day in ("%Y/%m/%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y")
    for clock in (" %H:%M:%S%.f", " %H:%M", " %I:%M:%S %p", " %I:%M %p", "")
)
TIME_FORMATS = ("iso", *OTHER)
INTEGER = r"^[+-]?\d{1,18}$"


def as_number(column: str, dtype: pl.DataType) -> pl.Expr:
    """A column as float64; null where it is no finite number. Texts may have separated thousands or be booleans."""
    value = pl.col(column)
    if dtype == pl.String:
        text = value.str.strip_chars()
        plain = pl.when(text.str.contains(GROUPED)).then(text.str.replace_all(",", "")).otherwise(text)
        number = pl.when(plain.str.contains(NUMBER)).then(plain.cast(pl.Float64, strict=False))
        lower = text.str.to_lowercase()
        boolean = pl.when(lower.is_in(list(TRUE))).then(1.0).when(lower.is_in(list(FALSE))).then(0.0)
        value = pl.coalesce(number, boolean)
    value = value.cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value).alias(column)


def as_integer(column: str, dtype: pl.DataType) -> pl.Expr:
    """A column as int64; null where it is no integer. Digits are kept exactly up to 18."""
    if dtype.is_integer():
        return pl.col(column).cast(pl.Int64, strict=False)
    number = as_number(column, dtype)
    whole = pl.when((number == number.floor()) & (number.abs() < 2.0**53)).then(number).cast(pl.Int64, strict=False)
    if dtype == pl.String:
        text = pl.col(column).str.strip_chars()
        exact = pl.when(text.str.contains(INTEGER)).then(text.cast(pl.Int64, strict=False))
        return pl.coalesce(exact, whole).alias(column)
    return whole.alias(column)


def as_text(column: str) -> pl.Expr:
    """A column as texts without spaces around them; an empty one is null."""
    text = pl.col(column).cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text).alias(column)


def as_time_ms(column: str, dtype: pl.DataType, how: str) -> pl.Expr:
    """A column as Unix milliseconds, UTC; null where it is no time.

    Args:
        column: its name.
        dtype: its type.
        how: a unit of numbers (s, ms, us, ns), or one of ``TIME_FORMATS``. Ignored for times.
    """
    value = pl.col(column)
    if dtype == pl.Date:
        return value.cast(pl.Datetime("ms")).dt.epoch("ms").alias(column)
    if isinstance(dtype, pl.Datetime):
        return value.dt.epoch("ms").alias(column)
    if how in TIME_UNITS:
        factor = TIME_UNITS[how]
        if dtype == pl.String or dtype.is_float():
            number = as_number(column, dtype)
            return (number * factor).round().cast(pl.Int64, strict=False).alias(column)
        whole = value.cast(pl.Int64, strict=False)
        return (whole * int(factor) if factor >= 1 else whole // round(1 / factor)).alias(column)
    text = value.str.strip_chars()
    if how == "iso":
        text = text.str.replace(r"[zZ]$", "+0000").str.replace(r"([+-]\d\d):(\d\d)$", "$1$2")
        text = text.str.replace(r"(\d\d:\d\d.*[+-]\d\d)$", "${1}00")
        zoned = [text.str.to_datetime(f, strict=False, time_unit="ms").dt.epoch("ms") for f in ISO[:3]]
        plain = [text.str.to_datetime(f, strict=False, time_unit="ms").dt.epoch("ms") for f in ISO[3:-1]]
        day = text.str.to_date(ISO[-1], strict=False).cast(pl.Datetime("ms")).dt.epoch("ms")
        return pl.coalesce(*zoned, *plain, day).alias(column)
    if "%H" not in how and "%I" not in how:
        return text.str.to_date(how, strict=False).cast(pl.Datetime("ms")).dt.epoch("ms").alias(column)
    return text.str.to_datetime(how, strict=False, time_unit="ms").dt.epoch("ms").alias(column)


def converted(frame: pl.DataFrame, schema: Schema, *, integers: Mapping[str, bool]) -> pl.DataFrame:
    """The columns of a schema with types that can be trained on, except the time column, which stays as it is.

    Args:
        frame: raw rows.
        schema: names the columns and their use.
        integers: by column of ids, whether they are integers; the others become texts.
    """
    done = {schema.time_column: pl.col(schema.time_column)}
    if schema.row_id:
        done[schema.row_id] = as_integer(schema.row_id, frame.schema[schema.row_id])
    for task in schema.tasks:
        done[task.column] = as_number(task.column, frame.schema[task.column])
        if task.mask:
            done[task.mask] = as_number(task.mask, frame.schema[task.mask]).fill_null(0.0).cast(pl.Boolean)
    for feature in schema.categorical:
        dtype = frame.schema[feature.column]
        if feature.kind != "one_hot":
            done[feature.column] = pl.col(feature.column)
            continue
        owner = schema.table_of(feature)
        words = {type(word) for word in owner.vocabulary}
        whole = int in words if words else owner.num_embeddings > 0 or integers[feature.column]
        done[feature.column] = as_integer(feature.column, dtype) if whole else as_text(feature.column)
    for dense in schema.dense:
        done[dense.column] = as_number(dense.column, frame.schema[dense.column])
    return frame.select(**done)
