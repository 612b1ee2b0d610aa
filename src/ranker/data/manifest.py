"""What a prepared directory holds, file by file: ``manifest.json``, written once, last, and read without a scan.

A prepared directory is::

    schema.yaml
    manifest.json
    day=2022-04-25.parquet
    day=2022-04-26.parquet
    ...

One file a UTC day (a day without rows may be left out), so the order of names is the order of time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ranker.errors import UserError

MANIFEST_FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One Parquet file.

    Attributes:
        path: its name within the directory, with forward slashes.
        rows: number of rows.
        time_min_ms: time of the first row, Unix milliseconds, UTC; None where it has no rows.
        time_max_ms: time of the last row.
        sha256: checksum of the file's bytes, in hexadecimal; empty where it was not taken.
        label_rates: by task, the mean of the observed labels (the rate of positives of a binary task, the mean of the
            transformed label of a regression); None where no label is observed.
    """

    path: str
    rows: int
    time_min_ms: int | None = None
    time_max_ms: int | None = None
    sha256: str = ""
    label_rates: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Every Parquet file of a prepared directory, in the order of time.

    Attributes:
        files: the entries, sorted by path.
        source: what the rows were made from, in words and plain values; for people and for finding a cached copy.
    """

    files: tuple[FileEntry, ...]
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda entry: entry.path)))

    @cached_property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(entry.rows for entry in self.files)

    def to_json(self) -> str:
        """The text of the file."""
        plain = {
            "format": FORMAT,
            "rows": self.rows,
            "source": dict(self.source),
            "files": [dataclasses.asdict(entry) for entry in self.files],
        }
        return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = MANIFEST_FILE) -> Manifest:
        """Reads the text of the file.

        Args:
            text: what the file holds.
            where: what to call it in an error, usually its path.

        Raises:
            UserError: it is no manifest, or of a format this version does not know.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}); prepare the data again") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise UserError(f"{where} is no manifest of format {FORMAT}; prepare the data again")
        try:
            files = tuple(FileEntry(**entry) for entry in raw["files"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: a file entry is broken ({error}); prepare the data again") from error
        return cls(files=files, source=raw.get("source", {}))

    @classmethod
    def read(cls, root: str | Path) -> Manifest | None:
        """The manifest of a local directory; None where it has none.

        Raises:
            UserError: there is one, but it is broken.
        """
        path = Path(root) / MANIFEST_FILE
        return cls.from_json(path.read_bytes(), where=str(path)) if path.is_file() else None

    def write(self, root: str | Path) -> None:
        """Writes the manifest into a directory, whole or not at all."""
        path = Path(root) / MANIFEST_FILE
        draft = path.with_suffix(".json.tmp")
        draft.write_text(self.to_json(), encoding="utf-8")
        os.replace(draft, path)


def day_file(day: str) -> str:
    """The name of a day's file; day is ``YYYY-MM-DD``."""
    return f"day={day}.parquet"


def sha256_of(path: str | Path) -> str:
    """Checksum of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
