"""The recipe of a published data set (its rows and how they are finished), and helpers to read source files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import polars as pl

from ranker.data.schema import Schema
from ranker.errors import UserError, suggest

TIME = "time_ms"
# Part of every fingerprint. Increase it when the same files would give other prepared data.
CODE_VERSION = 2
_TAIL = 65_536  # bytes at the end of a file in which its last line is looked for


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A data set that is ready to be prepared.

    Attributes:
        schema: the schema of the prepared rows. Its time column is ``time_ms``.
        logs: the log, one lazy frame per source file, in the published columns and with an int64 ``time_ms``. Or a
            Parquet file of such rows, which is removed once they are written.
        finish: converts raw rows (of some days, sorted, without duplicates) to the schema's columns.
        notes: notes for the user about this preparation, one sentence each.
    """

    schema: Schema
    logs: Mapping[Path, pl.LazyFrame | Path]
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


def csv_files(where: Path, pattern: str) -> list[Path]:
    """The files that match a pattern as they are or compressed (``.gz``), sorted.

    Raises:
        UserError: a file is there in both forms.
    """
    found = sorted([*where.glob(pattern), *where.glob(f"{pattern}.gz")])
    plain = [file.with_name(file.name.removesuffix(".gz")) for file in found]
    for file in found:
        if file.suffix == ".gz" and plain.count(file.with_suffix("")) > 1:
            raise UserError(f"{where} holds both {file.with_suffix('').name} and {file.name}; keep one")
    return found


def one_file(where: Path, pattern: str, what: str) -> Path:
    """The only file in a folder that matches a pattern, as it is or compressed.

    Raises:
        UserError: no file matches, or more than one.
    """
    found = csv_files(where, pattern)
    if not found:
        raise UserError(f"{what} is missing: no {pattern} in {where}")
    if len(found) > 1:
        raise UserError(f"{where} holds more than one {pattern}: {', '.join(f.name for f in found)}; keep one")
    return found[0]


def scan_csv(file: Path, columns: Mapping[str, type[pl.DataType]]) -> pl.LazyFrame:
    """A lazy frame of a CSV file with a header, with the given column types. Other columns are read as text.

    The file may be compressed (``.gz``) and begin with a byte order mark. Blank lines at its end are left out.

    Raises:
        UserError: the file is empty, lacks a column, or its last line is cut off or no row.
    """
    with opened(file) as lines:
        header = next(csv.reader([lines.readline()]), [])
    if not header:
        raise UserError(f"{file} is empty; fetch it again")
    for name in columns:
        if name not in header:
            raise UserError(f"{file.name} has no column '{name}'; {suggest(name, header)} (folder {file.parent})")
    check_last_line(file, lambda line: len(next(csv.reader([line]))), fields=len(header))
    types = {name: columns.get(name, pl.String) for name in header}
    frame = pl.scan_csv(file, schema=types, null_values=["", "NULL", "nan"], glob=False)
    return frame.filter(~pl.all_horizontal(pl.all().is_null()))  # Polars reads a blank line as a row of nulls


@contextmanager
def opened(file: Path) -> Iterator[IO[str]]:
    """A text file, compressed or not, without its byte order mark.

    Raises:
        UserError: the compressed file is broken, or cut off before what is read.
    """
    how: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "replace", "newline": ""}
    try:
        with gzip.open(file, "rt", **how) if file.suffix == ".gz" else open(file, **how) as lines:
            yield lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} cannot be unpacked ({error}); fetch it again") from error


def check_last_line(file: Path, count: Callable[[str], int], *, fields: int) -> None:
    """Checks that the last line that is not blank is a row, because a download may be cut off or end in a remark.

    Polars fills a short line with nulls, so it would become a row without a word.

    Args:
        file: the file.
        count: number of fields of a line.
        fields: number of fields of a row.

    Raises:
        UserError: the last line has another number of fields.
    """
    if file.suffix == ".gz":
        with opened(file) as lines:
            ends = deque((line for line in lines if line.strip()), maxlen=1)
        last = ends[0] if ends else ""
    else:
        with open(file, "rb") as raw:
            raw.seek(max(0, file.stat().st_size - _TAIL))
            tail = raw.read().decode("utf-8", errors="replace").rstrip()
        last = tail[tail.rfind("\n") + 1 :]
    last = last.strip()
    if last and count(last) != fields:
        raise UserError(
            f"{file}: the last line has {count(last)} of {fields} fields ({last[:40]!r}); delete it, or fetch the file "
            "again if it is cut off"
        )


def collected(frame: pl.LazyFrame, file: Path) -> pl.DataFrame:
    """The few rows of a lazy frame.

    Raises:
        UserError: the file cannot be parsed.
    """
    try:
        return frame.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}; fetch it again") from error
