"""A schema for a log that has none: kinds, tasks, the time column, sizes of tables, log1p for heavy tails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import polars as pl
import pyarrow as pa

from ranker.data.column_roles import (
    is_binary,
    reads_as,
    time_columns,
    time_format,
)
from ranker.data.decode import decode
from ranker.data.inspection import SUSPECT, single_feature_aucs
from ranker.data.raw_log import RawLog, RawProfile
from ranker.data.raw_values import as_time_ms, converted
from ranker.data.row_faults import Place, bad_rows, drop_rows
from ranker.data.schema import Schema
from ranker.data.schema_maker import SchemaMaker
from ranker.errors import UserError, suggest


@dataclass
class Proposal:
    """A schema with the reasons for it.

    Attributes:
        schema: the schema, for the log after its conversion where it needs one.
        time: how the time column is read, see :func:`ranker.data.column_roles.time_format`.
        integers: by column of ids, whether they are integers.
        remarks: by column, what its entry is based on.
        left_out: columns that are neither feature nor task, with the reason.
        conversion: why the files cannot be trained on as they are; empty where they can.
        rows: number of rows.
    """

    schema: Schema
    time: str
    integers: dict[str, bool]
    remarks: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    conversion: list[str] = field(default_factory=list)
    rows: int = 0


def propose(
    log: RawLog, profile: RawProfile, *, name: str, time: str | None = None, tasks: Sequence[str] = ()
) -> Proposal:
    """Proposes a schema.

    Args:
        log: the files.
        profile: what is in them.
        name: of the schema.
        time: the time column; None looks for it.
        tasks: the columns to predict; empty looks for columns that are called like something a user did.

    Raises:
        UserError: no column is a time or a label, or one that was named is none.
    """
    columns = profile.columns
    for given in (*([time] if time else []), *tasks):
        if given not in columns:
            raise UserError(f"{log.source} has no column '{given}'; {suggest(given, columns)}")
    time_column, how = _time(profile, time, log.source)
    made = SchemaMaker(profile, time_column)
    chosen = list(tasks) or made.likely_tasks()
    if not chosen:
        binary = [c for c in columns if c != time_column and is_binary(columns[c])]
        raise UserError(
            f"no column of {log.source} is called like something that a user did; name what to predict with "
            f"--tasks COLUMN ... ({'0 or 1: ' + ', '.join(binary[:8]) if binary else 'no column holds 0 and 1'})"
        )
    made.add_tasks(chosen)
    # Lists last: they may share the table of a column.
    for column in sorted(columns.values(), key=lambda column: column.kind == "list"):
        made.add_feature(column)
    return _proposal(made, log, profile, name=name, how=how)


def _time(profile: RawProfile, given: str | None, source: str) -> tuple[str, str]:
    if given is not None:
        how = time_format(profile.columns[given], profile.sample[given])
        if not how:
            raise UserError(
                f"column '{given}' cannot be read as a time: numbers since 1970 (s, ms, us, ns; 2000 to 2100), "
                "timestamps and dates can, such as 2026-11-23T08:30:00Z"
            )
        return given, how
    found = time_columns(profile)
    if not found:
        raise UserError(f"no column of {source} looks like a time; name it with --time COLUMN, or add one to the log")
    name = next(iter(found))
    return name, found[name]


def _proposal(made: SchemaMaker, log: RawLog, profile: RawProfile, *, name: str, how: str) -> Proposal:
    """The whole, without features that give a label away."""
    unit = how if how in ("s", "us", "ns") else "ms"
    integers = {
        feature.column: reads_as(profile.columns[feature.column]) in ("integer", "boolean")
        for feature in made.categorical
    }
    proposal = Proposal(
        schema=Schema(
            name=name,
            time_column=made.time_column,
            time_unit=unit,
            dense=tuple(made.dense),
            categorical=tuple(made.categorical),
            tasks=tuple(made.tasks),
            row_id=made.row_id,
        ),
        time=how,
        integers=integers,
        remarks=made.remarks,
        left_out=made.left_out,
        rows=profile.rows,
    )
    without_leaks(proposal, profile)
    proposal.conversion = reasons_to_convert(proposal, log, profile)
    return proposal


def sample_rows(proposal: Proposal, profile: RawProfile) -> pa.Table:
    """The sample as it will be after the conversion."""
    frame = pl.DataFrame(pl.from_arrow(profile.sample))
    name = proposal.schema.time_column
    frame = frame.with_columns(as_time_ms(name, frame.schema[name], proposal.time)).filter(pl.col(name).is_not_null())
    return converted(frame, proposal.schema, integers=proposal.integers).to_arrow()


def without_leaks(proposal: Proposal, profile: RawProfile) -> None:
    """Leaves out the features that predict a task almost alone: they were most likely written after it.

    Raises:
        UserError: no feature is left.
    """
    schema = replace(proposal.schema, time_unit="ms")
    rows = sample_rows(proposal, profile)
    if not len(rows):
        raise UserError(f"no row has a time in column '{schema.time_column}'; name another one with --time COLUMN")
    batch, faults = decode(rows, schema=schema, first_row=0, place=Place(file="the log", row_group=0))
    if faults:
        batch = drop_rows(batch, bad_rows(faults))
    leaks: dict[str, str] = {}
    for feature, task, auc in single_feature_aucs(batch, schema):
        if auc >= SUSPECT:
            leaks.setdefault(feature, f"it alone predicts {task} (AUC {auc:.3f}): is it known before the label?")
    columns = {f.name: f.column for f in schema.dense} | {f.name: f.column for f in schema.categorical}
    if set(leaks) == set(columns):
        raise UserError("no feature is left: each one is constant, names the row, or predicts a task alone")
    proposal.left_out |= {columns[name]: reason for name, reason in leaks.items()}
    proposal.schema = proposal.schema.select(drop_features=list(leaks)) if leaks else proposal.schema


def reasons_to_convert(proposal: Proposal, log: RawLog, profile: RawProfile) -> list[str]:
    """Why the files cannot be trained on as they are."""
    if log.is_csv:
        return ["CSV is read as Parquet, in time order"]
    schema, found = proposal.schema, []
    if len(log.files) == 1 and log.files[0].samefile(log.source):
        found.append("a log is a folder")
    if schema.time_column in profile.unsorted:
        found.append(f"the rows are not in the order of '{schema.time_column}'")
    time = profile.columns[schema.time_column]
    if time.kind == "string" or time.type in ("float", "halffloat"):
        found.append(f"the times in '{schema.time_column}' are written as {time.type}")
    if time.null_share:
        found.append(f"{time.null_share:.2%} of the rows have no time")
    for column in (profile.columns[name] for name in schema.columns()):
        if column.nans:
            found.append(f"'{column.name}' holds NaN or infinity")
    for feature in schema.categorical:
        if profile.columns[feature.column].kind == "float":
            found.append(f"the ids in '{feature.column}' are written as {profile.columns[feature.column].type}")
        if profile.columns[feature.column].kind == "string" and proposal.integers[feature.column]:
            found.append(f"the integers in '{feature.column}' are written as texts")
    for name in (*(f.column for f in schema.dense), *(t.column for t in schema.tasks)):
        if profile.columns[name].kind == "string":
            found.append(f"the numbers in '{name}' are written as texts")
    return list(dict.fromkeys(found))
