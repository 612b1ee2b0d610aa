"""Atomic writes: a file appears whole or not at all, whatever happens to the process that writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside a file, and renames it to the file when the block ends without an error.

    The temporary file is hidden and carries the process id, so that two processes never share one. It is removed when
    the block fails, such as on a full disk. The folder is made if it is missing.

    Args:
        path: the file to write.

    Yields:
        Where to write.

    Raises:
        OSError: whatever writing or renaming raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
