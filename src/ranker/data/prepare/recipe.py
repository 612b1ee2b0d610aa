"""The recipe of a published data set (its rows and how they are finished), and helpers to read source files."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ranker.data.schema import Schema
from ranker.errors import UserError, suggest

TIME = "time_ms"
# Part of every fingerprint. Increase it when the same files would give other prepared data.
CODE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A data set that is ready to be prepared.

    Attributes:
        schema: the schema of the prepared rows. Its time column is ``time_ms``.
        logs: the log, one lazy frame per source file, in the published columns and with an int64 ``time_ms``.
        finish: converts raw rows (of some days, sorted, without duplicates) to the schema's columns.
        notes: notes for the user about this preparation, one sentence each.
    """

    schema: Schema
    logs: Mapping[Path, pl.LazyFrame]
    finish: Callable[[pl.DataFrame], pl.DataFrame]
    notes: Sequence[str] = ()


def fingerprint(kind: str, files: Sequence[Path]) -> str:
    """A cache key that changes with the files' names, sizes and times, with the kind and with CODE_VERSION."""
    digest = hashlib.sha256(f"{kind} {CODE_VERSION}".encode())
    for file in sorted(files):
        stat = file.stat()
        digest.update(f"\n{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def folder(source: str | Path, what: str) -> Path:
    """The source folder as a path.

    Raises:
        UserError: it is not a folder.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError(f"no folder {path}; data.source (or SRC) is the folder with the {what} files")
    return path


def one_file(where: Path, pattern: str, what: str) -> Path:
    """The only file in a folder that matches a pattern.

    Raises:
        UserError: no file matches, or more than one.
    """
    found = sorted(where.glob(pattern))
    if not found:
        raise UserError(f"{what} is missing: no {pattern} in {where}")
    if len(found) > 1:
        raise UserError(f"{where} holds more than one {pattern}: {', '.join(f.name for f in found)}; keep one")
    return found[0]


def scan_csv(file: Path, columns: Mapping[str, type[pl.DataType]]) -> pl.LazyFrame:
    """A lazy frame of a CSV file with a header, with the given column types. Other columns are read as text.

    Raises:
        UserError: the file is empty or lacks a column.
    """
    with open(file, encoding="utf-8", newline="") as text:
        header = next(csv.reader(text), [])
    if not header:
        raise UserError(f"{file} is empty; fetch it again")
    for name in columns:
        if name not in header:
            raise UserError(f"{file.name} has no column '{name}'; {suggest(name, header)} (folder {file.parent})")
    types = {name: columns.get(name, pl.String) for name in header}
    return pl.scan_csv(file, schema=types, null_values=["", "NULL", "nan"])
