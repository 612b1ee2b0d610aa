"""A log of one's own, CSV or unsorted Parquet, as Parquet by UTC day in time order with the columns of a schema."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.atomic import locked, replacing_folder
from ranker.data.column_profile import ColumnProfile
from ranker.data.column_roles import reads_as, time_format
from ranker.data.manifest import Manifest
from ranker.data.prepare.buckets import Step
from ranker.data.prepare.days import write_days
from ranker.data.prepare.recipe import TIME, Recipe
from ranker.data.prepare.spark import PIECE_ROWS, Cluster
from ranker.data.raw_log import SAMPLE, RawLog, RawProfile, profiled
from ranker.data.raw_values import as_time_ms, converted
from ranker.data.schema import SCHEMA_FILE, Schema
from ranker.errors import UserError, suggest
from ranker.installation import command_line


def prepare_own(
    source: str, destination: str | Path, schema: Schema, *, step: Step, cluster: Cluster | None = None
) -> Manifest:
    """Writes a raw log so that it can be trained on. Memory does not grow with it.

    Texts become numbers, ids and times (see :mod:`ranker.data.raw_values`), NaN becomes null, exact duplicates and rows
    without a time are dropped, and the rest is sorted.

    Args:
        source: file or folder, as of :meth:`RawLog.open`.
        destination: folder to create.
        schema: columns to keep.
        step: progress bar, as of :func:`write_days`.
        cluster: Spark, which does the work. None: this machine.

    Raises:
        UserError: a column of the schema is missing or is no time, a file is broken, or the destination is not empty.
    """
    log, target = RawLog.open(source), Path(destination).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; name a new folder")
    there = log.columns(log.files[0])
    for name in schema.columns():
        if name not in there and any(f"/{name}=" in file.as_posix() for file in log.files):
            raise UserError(
                f"{source}: column '{name}' stands in the names of folders; put the schema into {source} and use "
                f"{command_line('prepare')} rewrite {source} {destination}"
            )
        if name not in there:
            raise UserError(f"{source} has no column '{name}' of schema '{schema.name}'; {suggest(name, there)}")
    if cluster is not None:  # whose tasks may run elsewhere
        log = RawLog(source=source, files=tuple(file.absolute() for file in log.files), is_csv=log.is_csv)
        target = target.absolute()
    with step("reading") as advance:
        profile = profiled(log, advance=advance) if cluster is None else _profiled(log, schema, cluster)
    how = _time_format(profile, schema)
    integers = {f.column: reads_as(profile.columns[f.column]) in ("integer", "boolean") for f in schema.categorical}
    with locked(target), replacing_folder(target) as draft:
        with tempfile.TemporaryDirectory(dir=draft, prefix="staging-") as staging:
            with step("converting", profile.rows if cluster is None else None) as advance:
                convert = partial(_converted, log, schema, integers, how, Path(staging))
                if cluster is None:
                    parts = [convert(number, (file, None), advance) for number, file in enumerate(log.files)]
                else:
                    pieces = log.pieces(PIECE_ROWS)
                    parts = cluster.each(lambda number: convert(number, pieces[number], int), len(pieces))
            logs = {part.path: part.path for part in parts if part.path is not None}
            recipe = Recipe(schema=schema, logs=logs, finish=_unchanged)
            write = write_days if cluster is None else cluster.write_days
            written = write(recipe, draft, staging=Path(staging), step=step)
        schema.to_yaml(draft / SCHEMA_FILE)
        kept, untimed = sum(entry.rows for entry in written.entries), sum(part.untimed for part in parts)
        skipped = {name: lines for part in parts for name, lines in part.skipped.items()}
        manifest = Manifest(
            files=written.entries,
            source={
                "kind": "log",
                "source": source,
                "rows_read": profile.rows,
                "duplicates_dropped": written.rows_read - kept,
                "without_time": untimed,
                "broken_lines": sum(skipped.values()),
                "notes": _notes(skipped, untimed),
            },
        )
        manifest.write(draft)
    return manifest


def _unchanged(rows: pl.DataFrame) -> pl.DataFrame:
    return rows


def _profiled(log: RawLog, schema: Schema, cluster: Cluster) -> RawProfile:
    """The profile of a log from those of its parts. Only the time column is sampled."""
    pieces, name = log.pieces(PIECE_ROWS), schema.time_column

    def part(number: int) -> RawProfile:
        file, groups = pieces[number]
        found = profiled(replace(log, files=(file,), skipped={}), groups=groups, names=schema.columns())
        return replace(found, sample=found.sample.select([name]).slice(0, SAMPLE // len(pieces) + 1))

    parts = [found for found in cluster.each(part, len(pieces)) if found.rows]
    if not parts:
        raise UserError(f"{log.source} has no rows")
    columns = {name: ColumnProfile(name) for name in schema.columns()}
    for found in parts:
        for name, column in found.columns.items():
            columns[name].merge(column)
    sample = pa.concat_tables([found.sample for found in parts], promote_options="permissive")
    rows, unsorted = sum(found.rows for found in parts), frozenset[str]()
    return RawProfile(rows=rows, columns=columns, sample=sample, unsorted=unsorted)


def _time_format(profile: RawProfile, schema: Schema) -> str:
    name = schema.time_column
    how = time_format(profile.columns[name], profile.sample[name])
    if not how:
        raise UserError(
            f"column '{name}' cannot be read as a time; write ISO 8601 such as 2026-11-23T08:30:00Z, or a number since "
            "1970"
        )
    return how


@dataclass(frozen=True, kw_only=True)
class _Converted:
    """A part of the log as Parquet (None if it has no row left), its rows without a time, and its broken lines."""

    path: Path | None
    untimed: int
    skipped: dict[str, int]


def _converted(
    log: RawLog,
    schema: Schema,
    integers: Mapping[str, bool],
    how: str,
    staging: Path,
    number: int,
    piece: tuple[Path, list[int] | None],
    advance: Callable[[int], object],
) -> _Converted:
    """A part of the log as Parquet with the schema's columns and their times."""
    path, writer, untimed = staging / f"converted-{number}.parquet", None, 0
    draft = staging / f".converted-{number}.{os.getpid()}.{os.urandom(4).hex()}"  # the same task may run twice
    log.skipped.clear()
    try:
        for table in log.batches(*piece):
            frame = pl.DataFrame(pl.from_arrow(table.select(schema.columns())))
            rows, advanced = _rows(frame, schema, integers, how), len(frame)
            untimed += len(frame) - len(rows)
            made = rows.to_arrow()
            writer = writer or pq.ParquetWriter(draft, made.schema, compression="lz4")
            writer.write_table(made.cast(writer.schema))
            advance(advanced)
    except pa.ArrowInvalid as error:
        raise UserError(f"{piece[0]}: its columns change their types: {error}") from error
    finally:
        if writer is not None:
            writer.close()
    if writer is not None:
        draft.replace(path)
    return _Converted(path=None if writer is None else path, untimed=untimed, skipped=dict(log.skipped))


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


def _notes(skipped: Mapping[str, int], untimed: int) -> list[str]:
    notes = []
    if skipped:
        files = ", ".join(f"{count:,} in {name}" for name, count in skipped.items())
        notes.append(f"lines with too many or too few fields were left out: {files}")
    if untimed:
        notes.append(f"{untimed:,} rows without a readable time were left out")
    return notes
