"""A log as somebody has it: CSV or Parquet files without a schema, read in pieces."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ranker.data.arrow_types import plain
from ranker.data.column_profile import ColumnProfile
from ranker.data.filesystem import few, one_line
from ranker.data.sketches import RowSample
from ranker.data.table_formats import files_of_table
from ranker.errors import UserError

NULLS = ["", "NULL", "null", "Null", "NA", "N/A", "n/a", "NaN", "nan", "None", "none", "\\N", "-"]
SAMPLE = 65_536  # rows behind quantiles and the search for leaks
BLOCK = 4 << 20  # bytes of a CSV file read at a time
BATCH = 65_536  # rows of a Parquet file read at a time
_PEEK = 65_536
_TABLE_FOLDERS = ("_delta_log", ".hoodie", "metadata")  # what shows that a folder is a table
_CSV, _PARQUET = (".csv", ".tsv", ".csv.gz", ".tsv.gz"), (".parquet", ".parq", ".pq")


@dataclass(frozen=True, kw_only=True)
class RawLog:
    """Files with the same columns.

    Attributes:
        source: the file or folder, as the user wrote it.
        files: in the order of their names.
        is_csv: whether they are CSV; all columns are then texts.
        skipped: number of lines left out so far because they have too many or too few fields, by file.
    """

    source: str
    files: tuple[Path, ...]
    is_csv: bool
    skipped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str) -> RawLog:
        """Finds the files.

        Args:
            source: a CSV or Parquet file, or a folder with files of one kind. CSV may be compressed (``.gz``).

        Raises:
            UserError: there is none, they are of both kinds, or their columns differ.
        """
        path = Path(source).expanduser()
        if not path.exists():
            raise UserError(f"no file or folder {source}; give a CSV or Parquet file, or a folder of some")
        found = [path] if path.is_file() else _files(path)
        csvs = [file for file in found if file.name.lower().endswith(_CSV)]
        parquets = [file for file in found if file.name.lower().endswith(_PARQUET)]
        if csvs and parquets:
            some = few([file.name for file in found])
            raise UserError(f"{source} holds CSV and Parquet files; give the ones of the log: {some}")
        if not csvs and not parquets:
            raise UserError(f"{source} is neither CSV nor Parquet (.csv, .tsv, .csv.gz, .parquet)")
        log = cls(source=source, files=tuple(csvs or parquets), is_csv=bool(csvs))
        names = {file: log.columns(file) for file in log.files}
        first = names[log.files[0]]
        for file, columns in names.items():
            if set(columns) != set(first):
                odd = sorted(set(columns) ^ set(first))
                raise UserError(
                    f"{file.name} and {log.files[0].name} have different columns ({few(odd)}); give only the files of "
                    "the log, and join other tables to it first"
                )
        return log

    def columns(self, file: Path) -> list[str]:
        """Names of a file's columns.

        Raises:
            UserError: it has none, or two of one name.
        """
        if self.is_csv:
            names = _dialect(file)[0]
        else:
            try:
                names = pq.read_schema(file).names
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file} is no Parquet file: {one_line(error)}") from error
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{file}: column '{twice[0]}' is there {names.count(twice[0])} times; rename one")
        return names

    def pieces(self, rows: int) -> list[tuple[Path, list[int] | None]]:
        """The log in parts that can be read on their own: a CSV file, or row groups of about so many rows together.

        Raises:
            UserError: a file cannot be read.
        """
        found: list[tuple[Path, list[int] | None]] = []
        for file in self.files:
            if self.is_csv:
                found.append((file, None))
                continue
            try:
                footer = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file} is no Parquet file: {one_line(error)}") from error
            found += [(file, groups) for groups in row_groups(footer, rows)]
        return found

    def batches(self, file: Path, groups: list[int] | None = None) -> Iterator[pa.Table]:
        """The rows of a file, or of some of its row groups, in parts.

        Raises:
            UserError: it cannot be read.
        """
        try:
            yield from self._csv_batches(file) if self.is_csv else self._parquet_batches(file, groups)
        except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)[:160]}") from error

    def _parquet_batches(self, file: Path, groups: list[int] | None) -> Iterator[pa.Table]:
        with pq.ParquetFile(file, coerce_int96_timestamp_unit="us") as stored:
            for batch in stored.iter_batches(batch_size=BATCH, row_groups=groups):
                yield plain(pa.Table.from_batches([batch]), where=str(file))

    def _csv_batches(self, file: Path) -> Iterator[pa.Table]:
        names, delimiter, encoding = _dialect(file)

        def skip(_: object) -> str:
            self.skipped[file.name] = self.skipped.get(file.name, 0) + 1
            return "skip"

        with pa.input_stream(str(file), compression="gzip" if file.suffix == ".gz" else None) as stream:
            reader = pa_csv.open_csv(
                stream,
                pa_csv.ReadOptions(column_names=names, skip_rows=1, block_size=BLOCK, encoding=encoding),
                pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
                pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    null_values=NULLS,
                    strings_can_be_null=True,
                ),
            )
            for batch in reader:
                yield pa.Table.from_batches([batch])


def row_groups(footer: pq.FileMetaData, rows: int) -> list[list[int]]:
    """Numbers of a file's row groups, as many together as have about so many rows."""
    found: list[list[int]] = []
    held = 0
    for group in range(footer.num_row_groups):
        here = footer.row_group(group).num_rows
        if not found or held + here > rows:
            found.append([])
            held = 0
        found[-1].append(group)
        held += here
    return found


@dataclass(frozen=True, kw_only=True)
class RawProfile:
    """What the rows of a raw log hold.

    Attributes:
        rows: number of rows.
        columns: a summary by column.
        sample: some rows, in the order of the files.
        unsorted: columns of numbers or times that fall somewhere within a file.
    """

    rows: int
    columns: dict[str, ColumnProfile]
    sample: pa.Table
    unsorted: frozenset[str]


def profiled(
    log: RawLog,
    *,
    advance: Callable[[int], object] = int,
    groups: list[int] | None = None,
    names: Sequence[str] | None = None,
) -> RawProfile:
    """Reads a raw log once, in memory that does not grow with it.

    Args:
        log: the files.
        advance: called with the number of rows read since the last call.
        groups: of a log of one Parquet file, the row groups to read. None: all.
        names: the columns to look at. None: all.

    Raises:
        UserError: a file cannot be read, or there is no row.
    """
    columns: dict[str, ColumnProfile] = {}
    sample, rows, unsorted = RowSample(SAMPLE), 0, set()
    log.skipped.clear()
    for file in log.files:
        last: dict[str, float] = {}
        for table in log.batches(file, groups):
            table = table if names is None else table.select(names)
            for name in table.column_names:
                columns.setdefault(name, ColumnProfile(name)).add(table[name])
                if not log.is_csv and name not in unsorted and _falls(table[name], last, name):
                    unsorted.add(name)
            sample.add(table, np.arange(rows, rows + table.num_rows))
            rows += table.num_rows
            advance(table.num_rows)
    kept = sample.table()
    if kept is None:
        raise UserError(f"{log.source} has no rows")
    return RawProfile(rows=rows, columns=columns, sample=kept, unsorted=frozenset(unsorted))


def _falls(column: pa.ChunkedArray, last: dict[str, float], name: str) -> bool:
    """Whether a column of numbers or times is smaller somewhere than in the row before."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        column = column.cast(pa.int64())
    elif pa.types.is_date32(kind):
        column = column.cast(pa.int32())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return False
    values = column.drop_null().to_numpy()
    if not len(values):
        return False
    before = last.get(name)
    last[name] = float(values[-1])
    return bool((values[1:] < values[:-1]).any()) or (before is not None and float(values[0]) < before)


def _files(path: Path) -> list[Path]:
    found = sorted(file for file in path.rglob("*") if file.name.lower().endswith((*_CSV, *_PARQUET)))
    found = [file for file in found if not any(p.startswith((".", "_")) for p in file.relative_to(path).parts)]
    if not found:
        raise UserError(f"no CSV or Parquet files in {path}")
    names = {file.relative_to(path).as_posix(): file for file in found}
    every = [file.relative_to(path).as_posix() for folder in _TABLE_FOLDERS for file in path.glob(f"{folder}/*")]
    return [names[name] for name in files_of_table(str(path), paths=every, names=list(names))]


def _dialect(file: Path) -> tuple[list[str], str, str]:
    """Names of the columns, delimiter and encoding of a CSV file.

    Raises:
        UserError: it is empty, or its first line is no header.
    """
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as raw:
            start = raw.read(_PEEK)
    except (OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    encoding = "utf-8-sig" if start.startswith(b"\xef\xbb\xbf") else "utf-8"
    try:
        text = start.decode(encoding)
    except UnicodeDecodeError as error:
        cut = error.start > len(start) - 4  # in the middle of a character
        encoding = encoding if cut else "cp1252"
        text = start[: error.start if cut else None].decode(encoding)
    line = text.splitlines()[0] if text.strip() else ""
    if not line.strip():
        raise UserError(f"{file} is empty, or its first line is; the first line names the columns")
    delimiter = max(",;\t|", key=line.count)
    names = [
        name.strip() or f"column_{place}" for place, name in enumerate(next(csv.reader([line], delimiter=delimiter)))
    ]
    if all(_is_number(name) for name in names):
        raise UserError(f"{file}: the first line ({line[:40]!r}) holds numbers; put the names of the columns there")
    return names, delimiter, encoding.removesuffix("-sig")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
