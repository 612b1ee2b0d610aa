"""A log of one's own, CSV or unsorted Parquet, as Parquet by UTC day in time order with the columns of a schema."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.atomic import locked, replacing_folder
from ranker.data.column_roles import reads_as, time_format
from ranker.data.manifest import Manifest
from ranker.data.prepare.buckets import Step
from ranker.data.prepare.days import write_days
from ranker.data.prepare.recipe import TIME, Recipe
from ranker.data.raw_log import RawLog, RawProfile, profiled
from ranker.data.raw_values import as_time_ms, converted
from ranker.data.schema import SCHEMA_FILE, Schema
from ranker.errors import UserError, suggest


def prepare_own(source: str, destination: str | Path, schema: Schema, *, step: Step) -> Manifest:
    """Writes a raw log so that it can be trained on. Memory does not grow with it.

    Texts become numbers, ids and times (see :mod:`ranker.data.raw_values`), NaN becomes null, exact duplicates and rows
    without a time are dropped, and the rest is sorted.

    Args:
        source: file or folder, as of :meth:`RawLog.open`.
        destination: folder to create.
        schema: columns to keep.
        step: progress bar, as of :func:`write_days`.

    Raises:
        UserError: a column of the schema is missing or is no time, a file is broken, or the destination is not empty.
    """
    log, target = RawLog.open(source), Path(destination).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; name a new folder")
    there = log.columns(log.files[0])
    for name in schema.columns():
        if name not in there:
            raise UserError(f"{source} has no column '{name}' of schema '{schema.name}'; {suggest(name, there)}")
    with step("reading") as advance:
        profile = profiled(log, advance=advance)
    how = _time_format(profile, schema)
    integers = {f.column: reads_as(profile.columns[f.column]) in ("integer", "boolean") for f in schema.categorical}
    with locked(target), replacing_folder(target) as draft:
        with tempfile.TemporaryDirectory(dir=draft, prefix="staging-") as staging:
            with step("converting", profile.rows) as advance:
                logs, untimed = _staged(log, schema, integers, how, Path(staging), advance)
            recipe = Recipe(schema=schema, logs=logs, finish=lambda frame: frame)
            written = write_days(recipe, draft, staging=Path(staging), step=step)
        schema.to_yaml(draft / SCHEMA_FILE)
        kept = sum(entry.rows for entry in written.entries)
        manifest = Manifest(
            files=written.entries,
            source={
                "kind": "log",
                "source": source,
                "rows_read": profile.rows,
                "duplicates_dropped": written.rows_read - kept,
                "without_time": untimed,
                "broken_lines": sum(log.skipped.values()),
                "notes": _notes(log, untimed),
            },
        )
        manifest.write(draft)
    return manifest


def _time_format(profile: RawProfile, schema: Schema) -> str:
    name = schema.time_column
    how = time_format(profile.columns[name], profile.sample[name])
    if not how:
        raise UserError(
            f"column '{name}' cannot be read as a time; write ISO 8601 such as 2026-11-23T08:30:00Z, or a number since "
            "1970"
        )
    return how


def _staged(
    log: RawLog,
    schema: Schema,
    integers: Mapping[str, bool],
    how: str,
    staging: Path,
    advance: Callable[[int], None],
) -> tuple[dict[Path, Path], int]:
    """Each file as Parquet with the schema's columns and their times, and the number of rows without a time."""
    staged, untimed = {}, 0
    log.skipped.clear()
    for number, file in enumerate(log.files):
        path, writer = staging / f"converted-{number}.parquet", None
        try:
            for table in log.batches(file):
                frame = pl.DataFrame(pl.from_arrow(table.select(schema.columns())))
                rows, advanced = _rows(frame, schema, integers, how), len(frame)
                untimed += len(frame) - len(rows)
                made = rows.to_arrow()
                writer = writer or pq.ParquetWriter(path, made.schema, compression="lz4")
                writer.write_table(made.cast(writer.schema))
                advance(advanced)
        except pa.ArrowInvalid as error:
            raise UserError(f"{file}: its columns change their types: {error}") from error
        finally:
            if writer is not None:
                writer.close()
        if writer is not None:
            staged[file] = path
    return staged, untimed


def _rows(frame: pl.DataFrame, schema: Schema, integers: Mapping[str, bool], how: str) -> pl.DataFrame:
    name = schema.time_column
    timed = frame.with_columns(as_time_ms(name, frame.schema[name], how).alias(TIME)).filter(pl.col(TIME).is_not_null())
    rows = converted(timed, schema, integers=integers)
    moments = timed[TIME].cast(pl.Datetime("ms", "UTC"))
    if name in schema.feature_columns():
        return rows.with_columns(timed[TIME]) if name != TIME else rows
    if name == TIME:
        return rows.with_columns(timed[TIME])  # the sort needs it as a number; the unit is ms
    return rows.with_columns(moments.alias(name), timed[TIME])


def _notes(log: RawLog, untimed: int) -> list[str]:
    notes = []
    if log.skipped:
        files = ", ".join(f"{count:,} in {name}" for name, count in log.skipped.items())
        notes.append(f"lines with too many or too few fields were left out: {files}")
    if untimed:
        notes.append(f"{untimed:,} rows without a readable time were left out")
    return notes
