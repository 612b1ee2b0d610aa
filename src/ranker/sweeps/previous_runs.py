"""Earlier attempts at a run, found under a sweep's folder by the hash in their summary."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ranker.errors import UserError
from ranker.runs.config_identity import config_hash
from ranker.runs.run_folder import CONFIG, SUMMARY, RunFolder

FINISHED = ("completed", "diverged")  # a lost model is a result; only a failed run has none
LOCK = ".lock"


def attempts(sweep_dir: Path, mark: str) -> list[tuple[Path, dict[str, Any]]]:
    """Folders and summaries of the runs under a folder whose configuration has this hash."""
    found = []
    for folder in _run_folders(sweep_dir):
        summary = _read(folder / SUMMARY)
        if summary.get("config_hash") == mark:
            found.append((folder, summary))
    return found


def left_off_at(folder: Path, mark: str) -> Path | None:
    """The checkpoint from which the run in a folder can go on; None where it must start afresh.

    Only a run that was killed or interrupted goes on: one that failed by itself may carry the cause in its state.
    """
    run, summary = RunFolder(folder), _read(folder / SUMMARY)
    if summary and not str(summary.get("reason")).startswith("interrupted"):
        return None
    if not (folder / CONFIG).is_file() or config_hash(run.load_config()) != mark:
        return None
    return run.newest_checkpoint() if any(run.checkpoints.glob("*.ckpt")) else None


def make_room(folder: Path, mark: str, others: list[Path]) -> None:
    """Removes earlier attempts at a run: what is left in its folder, and the other folders that hold one.

    Hydra's own files in the folder (``.hydra``, the log) are those of the job that starts now, and stay.

    Raises:
        UserError: the folder holds another run, which this one would overwrite.
    """
    if (folder / CONFIG).is_file() and config_hash(RunFolder(folder).load_config()) != mark:
        raise UserError(
            f"{folder} holds another run; add ${{config_hash:}} to hydra.sweep.subdir, so that each has its own folder"
        )
    for entry in folder.iterdir():
        if entry.name in (".hydra", LOCK) or entry.suffix == ".log":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for other in others:
        if other.resolve() != folder.resolve():
            shutil.rmtree(other)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a run's folder, so that the same job listed twice, or two sweeps at once, run it one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_folders(top: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(top):
        if SUMMARY in files:
            folders.clear()  # no run lies inside another
            yield Path(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # removed meanwhile by the job it belongs to, or not ours
        return {}
    return found if isinstance(found, dict) else {}
