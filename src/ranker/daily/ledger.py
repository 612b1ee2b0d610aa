"""What daily training has decided: days.jsonl, one line a day. A day with a line is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ranker.errors import UserError
from ranker.runs.run_folder import plain, whole_lines

DAYS = "days.jsonl"
PROMOTED, REFUSED, SKIPPED, LATE = "promoted", "refused", "skipped", "late"
VERDICTS = (PROMOTED, REFUSED, SKIPPED)


class Ledger:
    """Reads and appends to days.jsonl. A line is on the disk before ``append`` returns.

    A line of a day has ``verdict`` promoted, refused or skipped. A line with ``verdict`` late reports files that came
    or changed after their day was done.

    Args:
        folder: the folder of daily training.

    Attributes:
        lines: all lines, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / DAYS
        content = whole_lines(self.path) if self.path.is_file() else b""
        if self.path.is_file() and len(content) < self.path.stat().st_size:
            os.truncate(self.path, len(content))  # a process was killed in the middle of a line
        try:
            self.lines: list[dict[str, Any]] = [json.loads(line) for line in content.splitlines()]
        except ValueError as error:
            raise UserError(f"{self.path} is damaged ({error}); put it back, or choose another daily.dir") from error

    @property
    def days(self) -> dict[str, dict[str, Any]]:
        """The decided days, in order."""
        found = {line["day"]: line for line in self.lines if line["verdict"] in VERDICTS}
        return dict(sorted(found.items()))

    @property
    def good(self) -> str | None:
        """The day of the last good model; None before the first."""
        promoted = [day for day, line in self.days.items() if line["verdict"] == PROMOTED]
        return promoted[-1] if promoted else None

    def known_files(self, day: str) -> dict[str, str]:
        """The files of a day that were there when it was trained on, and those reported as late since."""
        found = dict(self.days[day]["files"])
        for line in self.lines:
            if line["verdict"] == LATE and line["day"] == day:
                found |= line["files"]
        return found

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line, whole or not at all."""
        with self.path.open("ab") as file:
            file.write(json.dumps(plain(line), allow_nan=False, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(plain(line))
