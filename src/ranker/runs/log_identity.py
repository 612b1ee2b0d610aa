"""What a run was trained on, kept in its folder: the schema and a fingerprint of the log. A resumed run must find both.

A position in the log stands for rows only while the log is the same. On a changed one, a resumed run would leave out
rows and train on others twice, without an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ranker.atomic import write_text
from ranker.data.log import Log, Selected
from ranker.data.parquet_log import ParquetLog
from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.runs.run_folder import FINGERPRINT, SCHEMA


def write(folder: Path, log: Log) -> None:
    """Writes schema.yaml and log.json into a run folder."""
    log.schema.to_yaml(folder / SCHEMA)
    write_text(folder / FINGERPRINT, json.dumps(fingerprint(log), indent=2) + "\n")


def fingerprint(log: Log) -> dict[str, Any]:
    """Rows of the log, and of each Parquet file with rows of the selected days a SHA-256 of its footer.

    A footer has the rows, the sizes and, where the writer made them, the smallest and largest values of all columns. It
    is read anyway, so a log of any size has a fingerprint at no cost. The name of the folder is not part of it.
    """
    source = log.source if isinstance(log, Selected) else log
    found: dict[str, Any] = {"rows": log.num_rows, "train_rows": log.train_rows}
    if isinstance(source, ParquetLog):
        return found | {"files": {name: footer_digest(source.index.metadata[name]) for name in source.files}}
    ends = (0, log.train_rows - 1, log.num_rows - 1)
    return found | {"times_ms": [log.time_at_row(row) for row in ends]}


def check_log(folder: Path, log: Log) -> None:
    """Refuses a log that is not the one of the run. Runs of older versions have no fingerprint and are not checked.

    Raises:
        UserError: the log differs; the line says in what.
    """
    check_schema(folder, log.schema)
    path = folder / FINGERPRINT
    if not path.is_file():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), fingerprint(log)
    if "files" in before and "files" in now:  # older versions also list the files of other days
        others = _unchanged_elsewhere(log, before["files"], now["files"])
        before["files"] = {name: digest for name, digest in before["files"].items() if name not in others}
    difference = _difference(before, now)
    if difference:
        raise UserError(
            f"the log is not the one that {folder} was trained on: {difference}. A resumed run would leave out rows "
            "and train on others twice: put the log back, or start a new run"
        )


def check_schema(folder: Path, schema: Schema) -> None:
    """Refuses a schema that is not the one of the run.

    Raises:
        UserError: it differs; the line says in what.
    """
    path = folder / SCHEMA
    if not path.is_file():
        return
    difference = _schema_difference(Schema.from_yaml(path).to_dict(), schema.to_dict())
    if difference:
        raise UserError(f"the schema beside the data is not the one of the run ({path}): {difference}; put it back")


def _unchanged_elsewhere(log: Log, before: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    """Files that are as they were and hold no row of the selected days."""
    source = log.source if isinstance(log, Selected) else log
    metadata = source.index.metadata if isinstance(source, ParquetLog) else {}
    return {n for n, x in before.items() if n not in now and n in metadata and footer_digest(metadata[n]) == x}


def footer_digest(footer: Any) -> str:
    """SHA-256 of the footer of a Parquet file, hexadecimal."""
    sink = pa.BufferOutputStream()
    footer.write_metadata_file(sink)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    old, new = before.get("files", {}), now.get("files", {})
    if added := sorted(new.keys() - old.keys()):
        return f"{', '.join(added)} is new"
    if missing := sorted(old.keys() - new.keys()):
        return f"{', '.join(missing)} is missing"
    if changed := [name for name in old if old[name] != new[name]]:
        return f"{', '.join(changed)} has other rows"
    for name, what in (
        ("rows", "rows"),
        ("train_rows", "rows before the hold-out"),
        ("times_ms", "first and last times"),
    ):
        if before.get(name) != now.get(name):
            return f"it has other {what} ({before.get(name)} then, {now.get(name)} now)"
    return None


def _schema_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for kind in ("dense", "categorical", "tasks"):
        old, new = ({entry["name"]: entry for entry in schema[kind]} for schema in (before, now))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                return f"'{name}' of {kind} is {old.get(name, 'missing')} in the run and {new.get(name, 'missing')} now"
        if list(old) != list(new):
            return f"the order of {kind} is {', '.join(old)} in the run and {', '.join(new)} now"
    for key in sorted((before.keys() | now.keys()) - {"name"}):
        if key == "groups" and key not in before:  # keys of rows, which runs of older versions did not have
            continue
        if before.get(key) != now.get(key):
            return f"{key} is {before.get(key)} in the run and {now.get(key)} now"
    return None
