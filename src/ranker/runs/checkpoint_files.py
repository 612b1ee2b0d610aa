"""The checkpoint files of a run: their names, which one is the newest, and whether a file is intact.

A run with sharded tables has a folder of each checkpoint beside the file, with the rows of all ranks.
"""

from __future__ import annotations

import errno
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ranker.atomic import write_text
from ranker.errors import UserError
from ranker.runs.table_files import copy_of

BEST, BEST_RECORD = "best", "best.json"
SHARDS, SHARD_FILES = "shards", "files.json"  # the folder of sharded tables; size and CRC-32 of its files, by name
_PIECE = 2**24  # bytes


def path_of(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"step={step}.ckpt"


def step_of(path: Path) -> int:
    """The step in a file's name; -1 for a file with another name."""
    word = path.stem.removeprefix("step=")
    return int(word) if word.isdecimal() else -1


def by_step(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the highest step last. File times do not count: a copy does not keep them."""
    return sorted((path for path in folder.glob("step=*.ckpt") if step_of(path) >= 0), key=step_of)


def shards_of(path: Path) -> Path:
    """The folder with the sharded tables of a checkpoint; the best one shares that of its step."""
    top = path.parent.parent if path.parent.name == BEST else path.parent
    return top / SHARDS / path.stem


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value


def damage_of_shards(folder: Path) -> str | None:
    """Why sharded tables cannot be used; None if they are intact. Reads every file once."""
    try:
        listed = json.loads((folder / SHARD_FILES).read_text(encoding="utf-8"))
        for name, (size, crc) in listed.items():
            path = folder / name
            if path.stat().st_size != size or checksum(path) != crc:
                return f"damaged (the checksum of {SHARDS}/{folder.name}/{name} is wrong)"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"without its tables ({SHARDS}/{folder.name}: {' '.join(str(error).split())[:100]})"
    return None


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used; None if it is intact.

    torch writes a zip archive whose records carry a CRC-32, and does not check it when it reads. A changed bit in a
    weight would load without an error. Reads the whole file once, and the full copy of tables that it adds to.
    """
    own = _damage(path)
    copy = None if own else copy_of(path)
    if copy is None:
        return own
    if not copy.is_file():
        return f"incomplete: the full copy of its tables, {copy}, is missing"
    reason = _damage(copy)
    return None if reason is None else f"incomplete: the full copy of its tables, {copy}, is {reason}"


def _damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile raises many types of errors for a damaged archive
        return f"truncated or not a checkpoint ({' '.join(str(error).split())[:100]})"
    if broken is not None:
        return f"damaged (the checksum of {broken} is wrong)"
    folder = shards_of(path)
    return damage_of_shards(folder) if folder.parent.is_dir() else None


def newest_intact(folder: Path, say: Callable[[str], None]) -> Path:
    """The intact checkpoint with the highest step.

    Args:
        folder: where they are.
        say: told of each damaged checkpoint that is passed over.

    Raises:
        UserError: there is none.
    """
    found = by_step(folder)
    if not found:
        raise UserError(
            f"no checkpoint in {folder}; the run ended before its first one, or train.checkpoint_every=0 kept none"
        )
    for path in reversed(found):
        reason = damage(path)
        if reason is None:
            return path
        say(f"{path} is {reason}; taking the checkpoint before it")
    raise UserError(
        f"no checkpoint in {folder} is intact; put back what is missing, or start the run again "
        "(force=true clears its folder)"
    )


@dataclass(frozen=True)
class Best:
    """The best evaluation on the hold-out so far.

    Attributes:
        metric: name of the metric, such as ``val/click/auc``.
        step: optimizer step.
        value: its value there.
    """

    metric: str
    step: int
    value: float

    @classmethod
    def read(cls, checkpoints: Path) -> Best | None:
        """The record in a checkpoint folder; None if there is none, or if its checkpoint is missing."""
        try:
            best = cls(**json.loads((checkpoints / BEST / BEST_RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return best if best.path(checkpoints).is_file() else None

    def path(self, checkpoints: Path) -> Path:
        """Its checkpoint: in a folder of its own, so that it is never taken for the newest one."""
        return path_of(checkpoints / BEST, self.step)

    def write(self, checkpoints: Path) -> None:
        """Writes the record, then removes the checkpoints of earlier bests."""
        write_text(checkpoints / BEST / BEST_RECORD, json.dumps(asdict(self), allow_nan=False) + "\n")
        for path in by_step(checkpoints / BEST):
            if path != self.path(checkpoints):
                path.unlink(missing_ok=True)


def full_disk(error: BaseException) -> str:
    """Why a file could not be written, from the operating system's error below torch's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
            return f"{cause.strerror or cause}{'; free space, then resume the run' if full else ''}"
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:200]
