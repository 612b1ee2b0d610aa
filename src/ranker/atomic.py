"""Atomic writes: a file or a folder is complete or absent, even if the process that writes it is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranker.errors import UserError


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside a file, and renames it to the file when the block ends without an error.

    The temporary file is hidden and its name contains the process id, so that two processes never share one. It is
    removed when the block fails, for example on a full disk. The parent folder is created if it is missing.

    Args:
        path: the file to write.
        durable: also after a power failure: the data are on the disk before the name is.

    Yields:
        Where to write.

    Raises:
        OSError: whatever writing or renaming raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _flush(temporary)
        temporary.replace(path)
        if durable:
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of a folder that is about to be written. Other processes wait.

    The lock is an empty file beside the folder, ``.NAME.lock``. The operating system releases it when the process dies.

    Args:
        target: the folder.

    Raises:
        UserError: the parent folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f".{target.name}.lock", "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"cannot write into {target.parent}: {error.strerror}; choose another folder") from error


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yields a new empty folder, and renames it to the target when the block ends without an error.

    Call it under :func:`locked`. Leftovers of a killed process are removed first. If the block fails, the new folder
    is removed and an existing target stays as it was. Otherwise an existing target is replaced.

    Args:
        target: the folder to write.

    Yields:
        The folder to fill, a hidden sibling of the target (on the same file system, so that the rename is atomic).

    Raises:
        UserError: the disk is full.
    """
    draft, old = (target.parent / f".{target.name}.{what}" for what in ("draft", "old"))
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        draft.mkdir()
        yield draft
        if target.exists():
            os.rename(target, old)
        os.rename(draft, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full at {target.parent}; free some space or choose another folder (nothing was kept)"
            ) from error
        raise
    finally:
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
