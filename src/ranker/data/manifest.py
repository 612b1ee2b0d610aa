"""The manifest of a prepared folder, ``manifest.json``: its files with rows, times, checksums and label rates.

The manifest is written last, once all files are complete. A prepared folder is::

    schema.yaml
    manifest.json
    day=2022-04-25.parquet
    day=2022-04-26.parquet
    ...

There is one file per UTC day (a day without rows may be missing), or a folder with several (``day=2022-04-25/
part-00000.parquet``) that a cluster wrote. The order of names is time order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ranker.atomic import write_text
from ranker.errors import UserError

MANIFEST_FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One Parquet file.

    Attributes:
        path: its name within the folder, with forward slashes.
        rows: number of rows.
        time_min_ms: time of the first row, Unix milliseconds, UTC. None without rows.
        time_max_ms: time of the last row, likewise.
        sha256: checksum of the file's bytes, hexadecimal. Empty if it was not computed.
        label_rates: by task, the mean of the observed labels (the rate of positives of a binary task, the mean of the
            transformed label of a regression). None if no label is observed.
    """

    path: str
    rows: int
    time_min_ms: int | None = None
    time_max_ms: int | None = None
    sha256: str = ""
    label_rates: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All Parquet files of a prepared folder, in time order.

    Attributes:
        files: the entries, sorted by path.
        source: origin of the rows as plain values, for people and to find a cached copy.
    """

    files: tuple[FileEntry, ...]
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda entry: entry.path)))

    @cached_property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(entry.rows for entry in self.files)

    @property
    def days(self) -> int:
        """Number of days with a file, or several in one folder, of a prepared log."""
        return len({entry.path.split("/")[0] for entry in self.files})

    def to_json(self) -> str:
        """The content of ``manifest.json``."""
        plain = {
            "format": FORMAT,
            "rows": self.rows,
            "source": dict(self.source),
            "files": [dataclasses.asdict(entry) for entry in self.files],
        }
        return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = MANIFEST_FILE) -> Manifest:
        """Parses the content of ``manifest.json``.

        Args:
            text: the content.
            where: name used in errors, usually the file's path.

        Raises:
            UserError: it is not a manifest, or has a format that this version does not support.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}); prepare the data again") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise UserError(f"{where} is not a manifest of format {FORMAT}; prepare the data again")
        try:
            files = tuple(FileEntry(**entry) for entry in raw["files"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: a file entry is broken ({error}); prepare the data again") from error
        return cls(files=files, source=raw.get("source", {}))

    @classmethod
    def read(cls, root: str | Path) -> Manifest | None:
        """The manifest of a local folder. None if it has none.

        Raises:
            UserError: the manifest is broken.
        """
        path = Path(root) / MANIFEST_FILE
        return cls.from_json(path.read_bytes(), where=str(path)) if path.is_file() else None

    def write(self, root: str | Path) -> None:
        """Writes the manifest into a folder, atomically."""
        write_text(Path(root) / MANIFEST_FILE, self.to_json())


def day_file(day: str) -> str:
    """Name of a day's file. ``day`` is ``YYYY-MM-DD``."""
    return f"day={day}.parquet"


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
