"""The journal of a sweep, to which its jobs report from any process, and the account made from it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranker.atomic import write_text

NAME = "sweep.jsonl"
BEFORE = "done before"


@dataclass
class Account:
    """The state of a sweep's jobs.

    Attributes:
        jobs: number of jobs; None if unknown.
        began: start time of the sweep, Unix seconds.
        states: latest state of each job by its number: ``started``, ``completed``, ``diverged``, ``failed`` or
            ``done before``.
        failures: run folder and reason of each failed job.
    """

    jobs: int | None = None
    began: float = 0.0
    states: dict[int, str] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def count(self, state: str) -> int:
        """Number of jobs in a state."""
        return sum(found == state for found in self.states.values())

    @property
    def done(self) -> int:
        """Number of jobs that ended, with any result."""
        return len(self.states) - self.count("started")

    @property
    def missing(self) -> int:
        """Number of jobs that have not ended."""
        return max(self.jobs or 0, len(self.states)) - self.done

    def seconds_left(self, now: float) -> float | None:
        """Estimated time left, in seconds, from the jobs that this call ran; None before the first one ended."""
        ran = self.done - self.count(BEFORE)
        if not ran or self.jobs is None:
            return None
        return (now - self.began) / ran * self.missing

    def line(self, now: float) -> str:
        """One line: jobs done, how they ended, time left."""
        parts = [f"{self.count(s)} {s}" for s in ("completed", "diverged", "failed", BEFORE) if self.count(s)]
        if running := self.count("started"):
            parts.append(f"{running} running")
        left = self.seconds_left(now)
        if left is not None and self.missing:
            parts.append(f"{duration(left)} left")
        total = "" if self.jobs is None else f" of {self.jobs}"
        return f"sweep: {self.done}{total} jobs done" + (f" ({', '.join(parts)})" if parts else "")


class Journal:
    """The file ``sweep.jsonl``: a header when the sweep starts, then one line whenever a job starts or ends.

    Args:
        sweep_dir: the sweep folder.
    """

    def __init__(self, sweep_dir: str | Path) -> None:
        self.path = Path(sweep_dir) / NAME

    def begin(self, jobs: int | None) -> None:
        """Replaces the journal. Jobs of earlier calls are recognised by their run folders, not by the journal."""
        write_text(self.path, json.dumps({"jobs": jobs, "began": time.time()}) + "\n")

    def add(self, job: int, state: str, *, run: Path, reason: str = "") -> None:
        """Appends the state of a job in a single write, so that lines of several processes do not mix."""
        entry: Mapping[str, Any] = {"job": job, "state": state, "run": str(run), "reason": reason}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read(self) -> Account:
        """The state of all jobs so far."""
        account = Account()
        if not self.path.is_file():
            return account
        failures: dict[int, tuple[str, str]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # another process is still writing it
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
    """A time in words: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
