"""File systems of logs: a local folder, ``file://``, ``s3://``, ``gs://``, ``hf://`` and other fsspec URLs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from ranker.data.table_formats import DELTA_LOG, files_of_table
from ranker.errors import UserError

T = TypeVar("T")

_TRIES = 4
_FIRST_PAUSE_S = 0.5
_OURS = (UserError, pa.ArrowException, AssertionError)

SCHEMA_FILE = "schema.yaml"
QUARANTINE_DIR = "quarantine"
# Endings of files that someone may expect to be read.
_DATA_ENDINGS = (
    *(".parquet", ".parquet.gz", ".parq", ".pq", ".orc", ".avro", ".feather", ".arrow"),
    *(".csv", ".csv.gz", ".jsonl", ".json.gz"),
)


@dataclass(frozen=True, kw_only=True)
class Root:
    """A folder on a file system.

    Attributes:
        filesystem: Arrow's file system.
        path: the folder's path on it.
        url: the path or URL as the user wrote it, for errors.
    """

    filesystem: fs.FileSystem
    path: str
    url: str

    def join(self, name: str) -> str:
        """Path of a file in the folder."""
        return f"{self.path.rstrip('/')}/{name}"

    def parquet_files(self) -> tuple[list[str], list[str]]:
        """Paths of the Parquet files in the folder and its subfolders, sorted, with forward slashes.

        Left out are hidden files and folders (``.x``, ``_x``, as in Spark and Hive), the folder ``quarantine``, and a
        subfolder with a schema.yaml, which is a log of its own. Of a Delta table, only the files of its newest version
        are read (``table_formats``).

        Returns:
            The files to read, and the files that look like data and are left out.

        Raises:
            UserError: the folder does not exist or has no Parquet file, or is a table that cannot be read by its files.
        """
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        infos = self.retried(lambda: self.filesystem.get_file_info(selector), what=f"listing {self.url}")
        base = self.path.strip("/") + "/"
        paths = sorted(info.path.lstrip("/").removeprefix(base) for info in infos if info.is_file)
        others = tuple(path.removesuffix(SCHEMA_FILE) for path in paths if path.endswith(f"/{SCHEMA_FILE}"))
        names, passed_over = [], []
        for path in paths:
            parts = path.split("/")
            if parts[0] == QUARANTINE_DIR:
                continue
            if (
                path.lower().endswith(".parquet")
                and not any(part.startswith((".", "_")) for part in parts)
                and not path.startswith(others)
            ):
                names.append(path)
            elif path.lower().endswith(_DATA_ENDINGS) and not path.startswith(DELTA_LOG):
                passed_over.append(path)
        names = files_of_table(self.url, paths=paths, names=names)
        if not names:
            there = f" (passed over: {few(passed_over)})" if passed_over else ""
            raise UserError(
                f"no Parquet files in {self.url}{there}: give a folder with schema.yaml and *.parquet files"
            )
        return names, passed_over

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        path = self.join(name)
        return self.retried(
            lambda: bool(self.filesystem.get_file_info(path).is_file), what=f"reading {self.url}/{name}"
        )

    def read_bytes(self, name: str) -> bytes | None:
        """The content of a small file. None if it does not exist."""
        path = self.join(name)

        def read() -> bytes | None:
            if not self.filesystem.get_file_info(path).is_file:
                return None
            with self.filesystem.open_input_stream(path) as stream:
                return stream.read()

        return self.retried(read, what=f"reading {self.url}/{name}")

    def retried(self, action: Callable[[], T], *, what: str) -> T:
        """Runs an action and retries it with growing pauses if it fails on a remote file system.

        Args:
            action: the action. It is retried after an ``OSError`` other than a missing file or a refused permission,
                and after other errors of fsspec's file systems (``hf://`` raises those of httpx).
            what: name of the action, for the error.

        Raises:
            UserError: it failed every time.
        """
        tries = 1 if isinstance(self.filesystem, fs.LocalFileSystem) else _TRIES
        for attempt in range(tries):
            try:
                return action()
            except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
                raise UserError(f"{what} failed: {one_line(error)}") from error
            except Exception as error:
                foreign = isinstance(self.filesystem, fs.PyFileSystem) and not isinstance(error, _OURS)
                if not isinstance(error, OSError) and not foreign:
                    raise
                if attempt == tries - 1:
                    times = f" {tries} times, last with" if tries > 1 else ""
                    raise UserError(f"{what} failed{times}: {one_line(error)}") from error
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("the loop returns or raises")


def open_root(root: str) -> Root:
    """Opens the file system of a path or URL.

    Args:
        root: a local path, or a URL. Arrow's own file systems come first (``file``, ``s3``, ``gs``, ``hdfs``), then
            fsspec's (``hf``, ``abfs``, ``memory``, ...) if fsspec is installed.

    Raises:
        UserError: no file system supports the URL.
    """
    root = str(root)
    if "://" not in root:
        # A shell does not expand the ~ in data.source=~/log.
        path = os.path.normpath(os.path.expanduser(root))
        return Root(filesystem=fs.LocalFileSystem(), path=path, url=root)
    try:
        filesystem, path = fs.FileSystem.from_uri(root)
    # ImportError: for hf://, Arrow itself imports fsspec.
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError, ImportError):
        filesystem, path = _from_fsspec(root)
    return Root(filesystem=filesystem, path=path, url=root)


def _from_fsspec(url: str) -> tuple[fs.FileSystem, str]:
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(f"{url}: Arrow does not support this kind of URL; pip install fsspec for more kinds") from error
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {one_line(error)}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def one_line(error: BaseException) -> str:
    """The text of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def few(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
