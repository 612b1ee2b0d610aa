"""How the jobs of a sweep are, told through a file, since they may run in other processes or on other machines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "sweep.jsonl"
BEFORE = "done before"


@dataclass
class Account:
    """What became of a sweep's jobs.

    Attributes:
        jobs: how many there are; None where the sweeper does not say.
        began: when the sweep was started, Unix seconds.
        states: the latest word of each job, by its number: ``started``, ``completed``, ``diverged``, ``failed``,
            ``done before``.
        failures: run folder and reason of each failed job.
    """

    jobs: int | None = None
    began: float = 0.0
    states: dict[int, str] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def count(self, state: str) -> int:
        """Jobs in this state."""
        return sum(found == state for found in self.states.values())

    @property
    def done(self) -> int:
        """Jobs that ended, in whatever way."""
        return len(self.states) - self.count("started")

    @property
    def missing(self) -> int:
        """Jobs that have not ended."""
        return max(self.jobs or 0, len(self.states)) - self.done

    def seconds_left(self, now: float) -> float | None:
        """Time left at the pace so far; None before a first job ran.

        Jobs that were done before count for nothing in the pace.
        """
        ran = self.done - self.count(BEFORE)
        if not ran or self.jobs is None:
            return None
        return (now - self.began) / ran * self.missing

    def line(self, now: float) -> str:
        """One line: jobs done of all, how they ended, time left."""
        parts = [f"{self.count(s)} {s}" for s in ("completed", "diverged", "failed", BEFORE) if self.count(s)]
        if running := self.count("started"):
            parts.append(f"{running} running")
        left = self.seconds_left(now)
        if left is not None and self.missing:
            parts.append(f"{duration(left)} left")
        total = "" if self.jobs is None else f" of {self.jobs}"
        return f"sweep: {self.done}{total} jobs done" + (f" ({', '.join(parts)})" if parts else "")


class Journal:
    """The file: a header when the sweep starts, then a line whenever a job starts or ends.

    Args:
        sweep_dir: the sweep's folder.
    """

    def __init__(self, sweep_dir: str | Path) -> None:
        self.path = Path(sweep_dir) / NAME

    def begin(self, jobs: int | None) -> None:
        """Starts anew: the journal is that of the latest call; what is done is known from the run folders."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"jobs": jobs, "began": time.time()}) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def add(self, job: int, state: str, *, run: Path, reason: str = "") -> None:
        """Adds a job's word; one write, so that those of other processes do not mix with it."""
        entry: Mapping[str, Any] = {"job": job, "state": state, "run": str(run), "reason": reason}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read(self) -> Account:
        """Everything told so far."""
        account = Account()
        if not self.path.is_file():
            return account
        failures: dict[int, tuple[str, str]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # another process is in the middle of writing it
                continue
            if "began" in entry:
                account.jobs, account.began = entry["jobs"], entry["began"]
                continue
            account.states[entry["job"]] = entry["state"]
            failures.pop(entry["job"], None)
            if entry["state"] == "failed":
                failures[entry["job"]] = (entry["run"], entry["reason"])
        account.failures = [failures[job] for job in sorted(failures)]
        return account


def duration(seconds: float) -> str:
    """A time as a person says it: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
