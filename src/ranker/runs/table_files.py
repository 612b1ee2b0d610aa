"""Full copies of large embedding tables, in files of their own, to which checkpoints add the rows that moved since.

A file is a zip archive of stored pieces, each with its CRC-32. It is written while training goes on: a piece is copied
and then written, so every piece is whole, but rows that move meanwhile are of different steps. That does no harm. A
checkpoint that names the file holds every row that has moved since the copy began.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ranker.atomic import replacing
from ranker.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

COPIES = "full_copies"  # the folder of full copies, in that of the checkpoints
CONTENTS = "tables.json"  # entry of a full copy: its tensors
ADDS_TO = "archive/full_copy"  # entry of a checkpoint: the full copy that it adds to. torch has all in archive/
PIECE_BYTES = 1 << 24
_LENGTHS = 26  # where the header of an entry has the lengths of its last fields


def write_copy(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a full copy of tensors that may change meanwhile, durably. Memory: one piece.

    Args:
        path: the file.
        tensors: by name, on any device, each with its rows along the first dimension.

    Raises:
        OSError: it cannot be written.
    """
    import torch

    contents = {name: [list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in tensors.items()}
    with replacing(path, durable=True) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(CONTENTS, json.dumps(contents))
        for name, tensor in tensors.items():
            for start, stop in _pieces(tensor):
                piece = tensor[start:stop].detach().to("cpu", copy=True).contiguous()
                archive.writestr(f"{name}/{start}", piece.view(-1).view(torch.uint8).numpy().data)


def read_copy(path: Path) -> dict[str, Tensor]:
    """The tensors of a full copy, on the CPU.

    Raises:
        UserError: it cannot be read.
    """
    import torch

    found: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name, (shape, dtype) in json.loads(archive.read(CONTENTS)).items():
                tensor = found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                for start, stop in _pieces(tensor):
                    target = tensor[start:stop].view(-1).view(torch.uint8).numpy().data
                    with archive.open(f"{name}/{start}") as file:
                        done = 0
                        while count := file.readinto(target[done:]):  # type: ignore[attr-defined]
                            done += count
    except Exception as error:  # zipfile raises many types of errors for a damaged archive
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no full copy of tables, or is damaged ({why})") from error
    return found


def mapped_copy(path: Path) -> dict[str, list[tuple[int, Tensor]]]:
    """The pieces of a full copy, mapped: by name of the tensor, the first row of each and its rows as bytes.

    Returns:
        Pieces uint8 [rows, bytes of a row], in memory that is read when it is used.

    Raises:
        UserError: it cannot be read.
    """
    found: dict[str, list[tuple[int, Tensor]]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name, (shape, _) in json.loads(archive.read(CONTENTS)).items():
                starts = sorted(
                    int(entry.removeprefix(f"{name}/"))
                    for entry in archive.namelist()
                    if entry.removeprefix(f"{name}/").isdecimal()
                )
                ends = [*starts[1:], shape[0]]
                found[name] = [
                    (start, mapped(path, archive, f"{name}/{start}").view(end - start, -1))
                    for start, end in zip(starts, ends, strict=True)
                ]
    except Exception as error:  # as in read_copy
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no full copy of tables, or is damaged ({why})") from error
    return found


class Slice(io.RawIOBase):
    """A part of a file as a file of its own, for an archive inside another file.

    Args:
        file: open for reading.
        start: its first byte.
        length: its bytes.
    """

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        """True."""
        return True

    def readable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        """As of any file."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As of any file."""
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        found = self._file.read(count)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def mapped(path: Path, archive: zipfile.ZipFile, name: str, *, before: int = 0) -> Tensor:
    """The bytes of a stored entry of an archive, uint8 [bytes], in memory that is read when it is used.

    Args:
        path: the file.
        archive: open.
        name: of the entry.
        before: bytes of the file before the archive.

    Raises:
        ValueError: the entry is compressed.
    """
    import numpy as np
    import torch

    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    if not entry.file_size:
        return torch.empty(0, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(before + entry.header_offset + _LENGTHS)
        lengths = struct.unpack("<HH", file.read(4))  # of the name and of extra fields, which end the entry's header
    start = before + entry.header_offset + _LENGTHS + 4 + sum(lengths)
    # Copy on write, because torch warns of memory that cannot be written to.
    return torch.from_numpy(np.memmap(path, np.uint8, "c", start, (entry.file_size,)))


def note_copy(checkpoint: Path, copy: str) -> None:
    """Writes into a checkpoint file which full copy it adds to, where no torch is needed to read it."""
    with zipfile.ZipFile(checkpoint, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(ADDS_TO, copy)


def copy_of(checkpoint: Path) -> Path | None:
    """The full copy that a checkpoint adds to, which may be missing; None for a checkpoint that holds everything.

    It is in the folder ``full_copies`` beside the checkpoint, or one folder up for the best one.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            if ADDS_TO not in archive.namelist():
                return None
            name = archive.read(ADDS_TO).decode()
    except (OSError, ValueError, zipfile.BadZipFile):  # damaged, which whoever reads it says
        return None
    beside, above = (folder / COPIES / name for folder in (checkpoint.parent, checkpoint.parent.parent))
    return above if above.is_file() and not beside.is_file() else beside


def _pieces(tensor: Tensor) -> list[tuple[int, int]]:
    """First row of each piece, and the one after its last."""
    rows = len(tensor)
    step = max(1, PIECE_BYTES // max(1, tensor[:1].nbytes))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
