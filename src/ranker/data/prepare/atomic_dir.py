"""A directory that appears whole or not at all, and that one process at a time makes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranker.data.manifest import MANIFEST_FILE
from ranker.errors import UserError


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of a directory to be made; others wait. The system frees it when the process dies.

    Args:
        target: the directory; the lock is an empty file beside it, ``.NAME.lock``.

    Raises:
        UserError: the folder it shall lie in cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f".{target.name}.lock", "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"cannot write into {target.parent}: {error.strerror}; choose another folder") from error


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A new directory to fill, renamed to the target at the end; call it under :func:`locked`.

    What an earlier process left behind when it was killed is cleared away first. If the filling fails, nothing
    stays. A prepared directory that was there before is replaced in the last moment; anything else is left alone.

    Args:
        target: where the finished directory shall be.

    Yields:
        The directory to fill, a hidden sibling of the target (same file system, so that the rename is atomic).

    Raises:
        UserError: the target holds something that is no prepared data, or the disk is full.
    """
    refuse_foreign(target)
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


def refuse_foreign(target: Path) -> None:
    """Raises a UserError where the target holds files that no preparation wrote."""
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
        raise UserError(f"{target} is not empty and holds no prepared data; name a new folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder")
