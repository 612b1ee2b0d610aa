"""Preparation on a Spark cluster: the recipes as they are, run by its workers on parts of the log.

Spark distributes and shuffles, and Polars computes. A worker reads a part of the log, cuts its rows by time into
buckets and hands them to Spark as bytes in Arrow's IPC format. Spark brings the parts of each bucket together, and a
worker removes duplicates, sorts, finishes and writes the bucket with the functions that one machine uses. So each
recipe exists once, and the rows are the same. Ids are hashed when the log is read, in either case.

An expression layer for both engines (narwhals 2.29) was tried. It has no cast or date format that gives null for what
cannot be read, no expression inside lists and no empty list, and its joins keep no order.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.manifest import FileEntry, day_file
from ranker.data.prepare.buckets import BUCKET_ROWS, SLOT_MS, Step, bucket_numbers, bucket_starts, by_bucket
from ranker.data.prepare.days import Written, in_order, rows_by_slot, slots_of, stage, write_part
from ranker.data.prepare.recipe import TIME, Recipe
from ranker.data.raw_log import row_groups
from ranker.data.times import DAY_MS
from ranker.errors import UserError

T = TypeVar("T")

PIECE_ROWS = 1_048_576  # rows that one task reads
_BATCH = 64  # buckets' parts that Spark hands to a worker at a time
_CAUSE = re.compile(r"ranker\.errors\.UserError: (.*)")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running Spark session. All paths must lead to the same files on all its machines.

    Attributes:
        session: the session.
    """

    session: Any = field(repr=False)

    def each(self, work: Callable[[int], T], number: int) -> list[T]:
        """``work(0) .. work(number - 1)``, each a task of its own.

        Raises:
            UserError: a task raised one, or Spark gave up.
        """

        def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for i in batch.column(0).to_pylist():
                    yield pa.record_batch({"i": [i], "result": [pickle.dumps(work(i))]})

        tasks = self.session.range(0, number, 1, number)
        rows = _outcome(tasks.mapInArrow(run, "i bigint, result binary").collect)
        return [pickle.loads(row.result) for row in sorted(rows, key=lambda row: row.i)]

    def write_days(self, recipe: Recipe, root: Path, *, staging: Path, step: Step) -> Written:
        """Writes a log's rows as :func:`ranker.data.prepare.days.write_days` does, in several files per day.

        A day is a folder ``day=2026-01-01`` with files of about BUCKET_ROWS rows each, in the order of their names.

        Args:
            recipe: source of the rows and how they are finished.
            root: an empty folder for the days.
            staging: an empty folder for temporary files. The caller removes it.
            step: progress bar.

        Raises:
            UserError: as ``days.write_days``, or Spark gave up.
        """
        sources = list(recipe.logs.items())
        with step("reading and counting"):
            staged = self.each(lambda i: _staged(*sources[i], staging / f"raw-{i}.parquet"), len(sources))
        counts = rows_by_slot(pl.concat([slots for _, slots in staged]))
        starts, total = bucket_starts(counts, rows=BUCKET_ROWS, within_days=True), sum(counts.values())
        names = file_names(starts)
        for folder in {name.parent for name in names}:
            (root / folder).mkdir(exist_ok=True)
        pieces = [(path, groups) for path, _ in staged for groups in row_groups(pq.read_metadata(path), PIECE_ROWS)]
        plain = replace(recipe, logs={})  # what each task is sent

        def deal(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for i in batch.column(0).to_pylist():
                    path, groups = pieces[i]
                    yield from _dealt(path, groups, starts)

        def write(key: tuple[pa.Scalar, ...], parts: pa.Table) -> pa.Table:
            entry = _written(parts, root=root, name=names[key[0].as_py()], recipe=plain)
            return pa.table({"entry": pa.array([pickle.dumps(entry)], pa.binary())})

        with step("sorting and writing"):
            tasks = self.session.range(0, len(pieces), 1, len(pieces))
            parts = tasks.mapInArrow(deal, "bucket bigint, part binary")
            rows = _outcome(parts.groupBy("bucket").applyInArrow(write, "entry binary").collect)
        entries = sorted((pickle.loads(row.entry) for row in rows), key=lambda entry: entry.path)
        assert [entry.path for entry in entries] == sorted(map(str, names))
        for left in root.glob("day=*/.part-*"):  # of tasks that died while they wrote
            left.unlink(missing_ok=True)
        return Written(entries=tuple(entries), rows_read=total)


@contextmanager
def cluster(master: str | None, settings: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A Spark session. One that exists already is used and left running.

    Args:
        master: URL of the cluster, such as ``local[2]``, ``spark://HOST:7077`` or ``yarn``. None: as spark-submit or
            spark-defaults.conf say, or all cores of this machine.
        settings: Spark's options, such as ``spark.executor.memory``.

    Raises:
        UserError: PySpark or Java is missing, or the cluster cannot be reached.
    """
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UserError("--engine spark needs PySpark: pip install 'evenkeel-ranker[spark]', and Java 17") from error
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # workers on this machine have the same packages
    existing = SparkSession.getActiveSession()
    builder = SparkSession.builder.appName("evenkeel prepare")
    if master:
        builder = builder.master(master)
    defaults = {
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(_BATCH),
        "spark.sql.session.timeZone": "UTC",
    }
    for key, value in {**defaults, **(settings or {})}.items():
        builder = builder.config(key, value)
    try:
        session = existing or builder.getOrCreate()
        if hasattr(session, "sparkContext"):  # a session of Spark Connect has none
            session.sparkContext.setLogLevel("FATAL")  # an error is raised, in one line
    except (PySparkException, OSError, ValueError, RuntimeError, _java_error()) as error:
        raise UserError(f"Spark does not start{f' on {master}' if master else ''}: {_first_line(error)}") from error
    try:
        yield Cluster(session=session)
    finally:
        if existing is None:
            session.stop()


def file_names(starts: Sequence[int]) -> list[Path]:
    """The file of each bucket: ``day=2026-01-01/part-00000.parquet``."""
    names: list[Path] = []
    for start in starts:
        moment = datetime.fromtimestamp(start * SLOT_MS // DAY_MS * (DAY_MS // 1000), tz=UTC)
        folder = Path(day_file(moment.strftime("%Y-%m-%d"))).stem
        number = int(names[-1].stem.split("-")[1]) + 1 if names and names[-1].parent.name == folder else 0
        names.append(Path(folder, f"part-{number:05}.parquet"))
    return names


def _staged(file: Path, frame: pl.LazyFrame | Path, path: Path) -> tuple[Path, pl.DataFrame]:
    """A source file as Parquet, and its rows by slot. A task that runs twice replaces the file by an equal one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    made = stage(file, frame, draft)
    if made == draft:
        draft.replace(path)
        made = path
    return made, slots_of([made])


def _dealt(path: Path, groups: list[int], starts: Sequence[int]) -> Iterator[pa.RecordBatch]:
    """The rows of some row groups, by bucket, as bytes."""
    with pq.ParquetFile(path) as stored:
        table = stored.read_row_groups(groups)
    for bucket, rows in by_bucket(table, bucket_numbers(table[TIME].to_numpy(), starts)):
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_stream(sink, rows.schema, options=options) as writer:
            writer.write_table(rows.combine_chunks())
        yield pa.record_batch({"bucket": [bucket], "part": [sink.getvalue().to_pybytes()]})


def _written(parts: pa.Table, *, root: Path, name: Path, recipe: Recipe) -> FileEntry:
    """Finishes and writes the rows of a bucket. A task that runs twice replaces the file by an equal one."""
    tables = [pa.ipc.open_stream(part.as_buffer()).read_all() for part in parts["part"]]
    frame = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables, promote_options="permissive")))
    rows = recipe.finish(in_order(frame))
    draft = root / name.parent / f".{name.name}.{os.getpid()}.{os.urandom(4).hex()}"
    entry = write_part(rows, draft, recipe.schema)
    draft.replace(root / name)
    return replace(entry, path=name.as_posix())


def _outcome(action: Callable[[], T]) -> T:
    """The result of a job. A ``UserError`` of a worker is raised here, other errors of Spark in one line.

    Raises:
        UserError: the job failed.
    """
    from pyspark.errors import PySparkException

    try:
        return action()
    except (PySparkException, _java_error()) as error:
        cause = _CAUSE.search(str(error))
        if cause:
            raise UserError(cause.group(1)) from error
        raise UserError(f"Spark gave up: {_first_line(error)}; the log of the job tells more") from error


def _java_error() -> type[Exception]:
    from py4j.protocol import Py4JError

    return Py4JError


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
