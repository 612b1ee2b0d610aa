"""The folder of an export: its file names, how it is written and read, and progress messages for long passes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ranker.atomic import write_text
from ranker.data.schema import SCHEMA_FILE, Schema
from ranker.errors import UserError, suggest

FORMAT = 1
ABOUT, METRICS, GATE = "export.json", "metrics.json", "gate.json"
PROGRAMS = {"pt2": "model.pt2", "onnx": "model.onnx"}


@contextlib.contextmanager
def new_folder(destination: Path, *, replace: bool) -> Iterator[Path]:
    """Yields a new folder, and renames it to the destination when the block ends without an error.

    The draft is named after the process, so that two exports at once do not mix their files.


    Args:
        destination: the folder to write.
        replace: replace an existing export.

    Yields:
        The folder to fill, a hidden sibling of the destination (on the same file system, so that the rename is atomic).

    Raises:
        UserError: the destination exists and must not be replaced.
    """
    refuse_existing(destination, replace=replace)
    destination.parent.mkdir(parents=True, exist_ok=True)
    draft = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        if destination.exists():
            old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
            destination.rename(old)
            draft.rename(destination)
            shutil.rmtree(old)
        else:
            draft.rename(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_existing(destination: Path, *, replace: bool) -> None:
    """Checks a destination before the export starts.

    Raises:
        UserError: the destination exists, and is not an export or must not be replaced.
    """
    if not destination.exists():
        return
    if not (destination / ABOUT).is_file():
        raise UserError(f"{destination} exists and is not an export; give another folder with --out")
    if not replace:
        raise UserError(f"{destination} holds an export already; --force replaces it, --out gives another folder")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, atomically."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Export:
    """An export folder.

    Attributes:
        path: the folder.
        schema: features and tasks.
        about: the contents of ``export.json``.
    """

    path: Path
    schema: Schema
    about: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Export:
        """Reads everything except the programs.

        Raises:
            UserError: the folder is not an export, or has another format version.
        """
        if not (path / ABOUT).is_file():
            raise UserError(f"no {ABOUT} in {path}; give a folder that scripts/export.py wrote")
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise UserError(f"{path} has format {about.get('format')}, this version reads {FORMAT}; export it again")
        return cls(path, Schema.from_yaml(path / SCHEMA_FILE), about)

    def program(self, form: str) -> Path:
        """The file of a program.

        Args:
            form: ``pt2`` or ``onnx``.

        Raises:
            UserError: the export does not contain this format.
        """
        formats = [name for name, file in PROGRAMS.items() if (self.path / file).is_file()]
        if form not in formats:
            raise UserError(f"{self.path} holds no {form} program; {suggest(form, formats)}")
        return self.path / PROGRAMS[form]


LINE_SECONDS = 15.0


def unseen(rows: int) -> None:
    """Default of ``advance``: shows no progress."""


@contextlib.contextmanager
def counted(label: str, *, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a pass over rows: a bar on a terminal, otherwise a line now and then.

    Args:
        label: what is being done.
        total: number of rows.
        console: the output.

    Yields:
        A function to call with the number of rows done since the last call.
    """
    if console.is_terminal:
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(label, total=total)
            yield lambda rows: progress.advance(task, rows)
        return
    done, spoken = 0, time.monotonic()

    def advance(rows: int) -> None:
        nonlocal done, spoken
        done += rows
        if time.monotonic() - spoken >= LINE_SECONDS:
            spoken = time.monotonic()
            console.print(f"{label}: {done:,} of {total:,} rows", highlight=False)

    yield advance
