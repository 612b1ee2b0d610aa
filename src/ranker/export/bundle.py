"""The folder of an export: its file names, how it is written and read, and progress messages for long passes."""

from __future__ import annotations

import contextlib
import hashlib
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
from ranker.runs.model_card import CARD, CARD_TEXT

FORMAT = 2  # 2: with checksums
ABOUT, METRICS, GATE = "export.json", "metrics.json", "gate.json"
CHECKSUMS = "SHA256SUMS"  # in the format of sha256sum, which checks it with: sha256sum -c SHA256SUMS
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
        UserError: the destination exists and must not be replaced, or cannot be written.
    """
    refuse_existing(destination, replace=replace)
    draft = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error.strerror}; give another folder with --out") from error
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


def write_checksums(folder: Path) -> None:
    """Writes the SHA-256 of every file of an export. Must be the last file."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    write_text(folder / CHECKSUMS, "".join(f"{_sha256(path)}  {path.name}\n" for path in files))


def check_files(folder: Path) -> None:
    """Compares every file of an export with its checksum.

    This finds a file that was damaged or exchanged on its way. It does not protect against somebody who can write the
    whole folder, because he can write the checksums too.

    Raises:
        UserError: a file is missing, has another checksum, or has none.
    """
    path = folder / CHECKSUMS
    try:
        lines = [line.partition("  ") for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read, so that the export cannot be checked; export it again") from error
    known = {name: digest for digest, _, name in lines}
    for name, digest in known.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} lacks the file '{name}' that {CHECKSUMS} names; copy the export again")
        if _sha256(folder / name) != digest:
            raise UserError(f"{folder / name} is damaged or was changed: its SHA-256 is not that of {CHECKSUMS}")
    for name in (
        SCHEMA_FILE,
        ABOUT,
        CARD,
        CARD_TEXT,
        *PROGRAMS.values(),
        *(path.name for path in folder.glob("*.onnx*")),
    ):
        if (folder / name).exists() and name not in known:
            raise UserError(f"{folder / name} has no checksum in {CHECKSUMS}; copy the export again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        """Checks all files, and reads everything except the programs.

        Raises:
            UserError: the folder is not an export, has another format version, or a file is not as it was written.
        """
        if not (path / ABOUT).is_file():
            raise UserError(f"no {ABOUT} in {path}; give a folder that scripts/export.py wrote")
        try:
            about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path / ABOUT} is damaged: it is no JSON; copy the export again") from error
        if not isinstance(about, dict):
            raise UserError(f"{path / ABOUT} is damaged: it holds no JSON object; copy the export again")
        if about.get("format") != FORMAT:
            raise UserError(f"{path} has format {about.get('format')}, this version reads {FORMAT}; export it again")
        check_files(path)
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
