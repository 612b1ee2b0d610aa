"""Reads what W&B keeps of a run on this machine: the file ``run-ID.wandb`` of every attempt, online and offline.

Private, because wandb has no public reader. The file is a log in the format of LevelDB: a header of 7 bytes, then
blocks of 32 KiB with records (checksum, length, kind, body) that hold messages of ``wandb_internal.proto``. wandb
writes to it before it uploads, in a process of its own, so it has what a killed run had sent. ``test_wandb_files.py``
says when the format changes. Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER, BLOCK, PREFIX = b":W&B", 32768, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
GLOBAL_STEP = "trainer/global_step"  # the step axis, as Lightning names it
ROW = "_step"  # wandb's own count of rows


@dataclass
class Sent:
    """What earlier attempts at a run have sent to W&B.

    Attributes:
        rows: number of rows, which the next row gets as its own number.
        values: number of the row by (step, name), of the values that came with or after the checkpoint's step.
        alerts: (title, text) of the alerts that came after it.
        extremes: smallest and largest value of each metric that ``wanted`` names, up to the checkpoint.
        newest: the highest step of each metric, up to the checkpoint.
    """

    rows: int = 0
    values: dict[tuple[int, str], int] = field(default_factory=dict)
    alerts: set[tuple[str, str]] = field(default_factory=set)
    extremes: dict[str, tuple[float, float]] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The highest step of ``values``; -1 without any."""
        return max((step for step, _ in self.values), default=-1)


def files_of(folder: Path, run_id: str) -> list[Path]:
    """The files of all attempts at a run, oldest first.

    Args:
        folder: the run folder; W&B's files are in ``wandb`` below it.
        run_id: the id of the run in W&B.
    """
    # Of attempts that started in one second, W&B numbers the later ones: run-TIME-ID-1.
    found = (folder / "wandb").glob(f"*run-*-{run_id}*/run-{run_id}.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def records(path: Path) -> Iterator[Any]:
    """The records of a file, up to the first one that is damaged or was cut off when the machine went down.

    Raises:
        ValueError: this is no file of W&B.
    """
    from wandb.proto import wandb_internal_pb2 as messages

    content = path.read_bytes()
    if not content.startswith(HEADER):
        raise ValueError(f"{path} does not begin as a file of W&B does")
    position, parts = 7, b""
    while position + PREFIX.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < PREFIX.size:
            position += left
            continue
        checksum, length, kind = PREFIX.unpack_from(content, position)
        start = position + PREFIX.size
        body = content[start : start + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or zlib.crc32(bytes([kind]) + body) != checksum:
            return
        position = start + length
        parts = body if kind in (FULL, FIRST) else parts + body
        if kind in (FULL, LAST):
            record = messages.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            yield record


def row_of(record: Any) -> dict[str, str]:
    """The values of a history record as JSON, by name; a part of a nested value by ``name.part``."""
    return {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}


def sent_before(folder: Path, run_id: str, *, step: int, known_rows: int | None, wanted: Callable[[str], bool]) -> Sent:
    """What W&B has of a run that resumes.

    Rows come in the order in which they were written. In each attempt, those that came after the checkpoint begin at
    the first row of its step or a later one: the scores of a window are recorded under the step before it, after the
    checkpoint of that step. A row of an earlier step that follows was written later too, because an event is recorded
    when it is judged.

    Args:
        folder: the run folder.
        run_id: the id of the run in W&B.
        step: the step of the checkpoint.
        known_rows: number of rows that the server has, so that rows lost on the way are sent again; None offline,
            where the files themselves are uploaded later.
        wanted: whether the extremes of a metric are needed, by its name.
    """
    sent = Sent()
    for path in files_of(folder, run_id):
        after = False
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run" and record.run.HasField("branch_point"):
                _rewind(sent, int(record.run.branch_point.value))
            elif kind == "alert" and after:
                sent.alerts.add((record.alert.title, record.alert.text))
            elif kind == "history":
                row = row_of(record)
                number = int(row.get(ROW, 0))
                if known_rows is not None and number >= known_rows:
                    continue
                sent.rows = max(sent.rows, number + 1)
                if GLOBAL_STEP not in row:
                    continue
                at = int(float(row[GLOBAL_STEP]))
                after = after or at >= step
                if after:  # a histogram is three values: name._type, name.bins, name.values
                    sent.values |= {(at, name.removesuffix("._type")): number for name in row}
                if at <= step:
                    _note_extremes(sent, row, wanted)
                    sent.newest |= {name: max(at, sent.newest.get(name, -1)) for name in row}
    return sent


def _rewind(sent: Sent, last: int) -> None:
    """Forgets what W&B dropped: the rows after the one with this number."""
    sent.rows = last + 1
    sent.values = {key: number for key, number in sent.values.items() if number <= last}
    sent.alerts.clear()


def _note_extremes(sent: Sent, row: dict[str, str], wanted: Callable[[str], bool]) -> None:
    for name, text in row.items():
        if not wanted(name):
            continue
        value = json.loads(text)
        if isinstance(value, (int, float)) and math.isfinite(value):
            low, high = sent.extremes.get(name, (math.inf, -math.inf))
            sent.extremes[name] = min(low, value), max(high, value)
