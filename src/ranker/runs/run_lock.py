"""The lock of a run folder: one process at a time trains in it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ranker.errors import UserError

LOCK = ".lock"
_HELD: set[Path] = set()  # by this process: a sweep's job holds the lock of the run that it starts


def job_of(environment: Mapping[str, str]) -> str | None:
    """The id of the SLURM job of a process, with its task in an array; None outside, and in an interactive job."""
    if environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment.get('SLURM_ARRAY_TASK_ID')}" if array else environment.get("SLURM_JOB_ID")


@contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a run folder. The operating system releases it when the process dies, however it dies.

    Args:
        folder: the run folder; it exists.
        wait: wait for another process instead of refusing.

    Raises:
        UserError: another process holds it, and ``wait`` is not set; or the folder cannot be written.
    """
    path = (folder / LOCK).resolve()
    if path in _HELD:
        yield
        return
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{folder} is in use by {holder}; wait until it ends, or use another folder") from error
        except OSError:  # a file system without locks: nothing better is to be had there
            pass
        with suppress(OSError):  # who holds it is said for information only
            file.truncate(0)
            job = job_of(os.environ)
            where = socket.gethostname() + (f" in SLURM job {job}" if job else "")
            file.write(f"process {os.getpid()} on {where}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        _HELD.add(path)
        try:
            yield
        finally:
            _HELD.discard(path)
