"""The folder that is handed out: programs, schema, metrics, the gate's report. It appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranker.data.schema import SCHEMA_FILE, Schema
from ranker.errors import UserError, suggest

FORMAT = 1
ABOUT, METRICS, GATE = "export.json", "metrics.json", "gate.json"
PROGRAMS = {"pt2": "model.pt2", "onnx": "model.onnx"}


@contextlib.contextmanager
def new_folder(destination: Path, *, replace: bool) -> Iterator[Path]:
    """A folder to fill, put in place when the block ends and removed when it raises.

    Args:
        destination: where it goes.
        replace: put it in the place of one that is there.

    Yields:
        The draft, beside the destination and so on the same file system.

    Raises:
        UserError: something is there and ``replace`` is false.
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
    """Asks first, before anything long is done.

    Raises:
        UserError: something is there that is not to be replaced, or that is no export.
    """
    if not destination.exists():
        return
    if not (destination / ABOUT).is_file():
        raise UserError(f"{destination} is there and is no export; give another folder with --out")
    if not replace:
        raise UserError(f"{destination} holds an export already; --force replaces it, --out gives another folder")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes plain data."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Export:
    """A folder that was handed out.

    Attributes:
        path: the folder.
        schema: features and tasks.
        about: what ``export.json`` says.
    """

    path: Path
    schema: Schema
    about: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Export:
        """Reads all but the program.

        Raises:
            UserError: it is no export, or one of a later version of this project.
        """
        if not (path / ABOUT).is_file():
            raise UserError(f"no {ABOUT} in {path}; give a folder that scripts/export.py wrote")
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise UserError(f"{path} has format {about.get('format')}, this version reads {FORMAT}; export it again")
        return cls(path, Schema.from_yaml(path / SCHEMA_FILE), about)

    def program(self, form: str) -> Path:
        """The file of a program.

        Raises:
            UserError: the export does not hold this format.
        """
        there = [name for name, file in PROGRAMS.items() if (self.path / file).is_file()]
        if form not in there:
            raise UserError(f"{self.path} holds no {form} program; {suggest(form, there)}")
        return self.path / PROGRAMS[form]
