"""The journal of a sweep, to which its jobs report from any process, and the progress lines made from it."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ranker import stop_signals
from ranker.atomic import write_text
from ranker.sweeps.job_list import count_jobs, is_parallel

NAME = "sweep.jsonl"
BEFORE = "done before"
POLL_SECONDS = 1.0


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


class Sweep:
    """Prints the progress of the sweep that this process launches.

    If jobs run in other processes, a thread prints a line when some have ended. If they run in this process, a line is
    printed after each job, where it does not break the job's progress bar.

    Args:
        folder: the sweep folder.
        jobs: number of jobs; None if unknown.
        parallel: whether jobs run in other processes.
        line_seconds: minimum time between two lines of the thread.
    """

    def __init__(self, folder: Path, *, jobs: int | None, parallel: bool, line_seconds: float) -> None:
        self.folder, self.parallel = folder, parallel
        self._journal = Journal(folder)
        self._journal.begin(jobs)
        self._line_seconds = line_seconds
        self._printed = 0  # jobs done in the last line
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        if parallel:
            self._thread.start()

    def print_progress(self) -> None:
        """Prints one line."""
        account = self._journal.read()
        self._printed = account.done
        print(account.line(time.time()), flush=True)

    def close(self, *, interrupted: bool) -> bool:
        """Stops the thread and prints the summary: the result of all jobs, and the reason of each failure.

        Args:
            interrupted: whether an error ended the sweep.

        Returns:
            Whether every job ended and none failed.
        """
        self._ended.set()
        if self.parallel:
            self._thread.join()
        account = self._journal.read()
        if interrupted and not account.states:
            return False  # no job started: the error itself is the whole message
        now = time.time()
        print(f"{account.line(now)} in {duration(now - account.began)}: {self.folder}", flush=True)
        for run, reason in account.failures:
            print(f"failed: {run}: {reason}", file=sys.stderr, flush=True)
        # A sweeper may launch fewer jobs than announced, for example a grid smaller than n_trials.
        missing = account.missing if interrupted else account.count("started")
        if missing:
            print(f"{missing} jobs did not end; run the same command to continue", file=sys.stderr, flush=True)
        return not account.failures and not missing

    def _follow(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            if time.monotonic() - last >= self._line_seconds and self._journal.read().done != self._printed:
                last = time.monotonic()
                self.print_progress()


_SWEEP: Sweep | None = None  # the sweep of this process; None in a worker process


class SweepWatch(Callback):
    """Hydra callback: starts the journal of a multirun, and prints a line after each job of this process.

    Args:
        line_seconds: minimum time between two lines about jobs in other processes.
    """

    def __init__(self, line_seconds: float = 15.0) -> None:
        self._line_seconds = line_seconds

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called before the first job."""
        global _SWEEP  # noqa: PLW0603  (Hydra pickles this object into worker processes, so it must not hold the thread)
        _SWEEP = Sweep(
            Path(config.hydra.sweep.dir),
            jobs=count_jobs(config),
            parallel=is_parallel(config.hydra.launcher),
            line_seconds=self._line_seconds,
        )

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Called after each job of this process."""
        if _SWEEP is not None and not _SWEEP.parallel:
            _SWEEP.print_progress()


@contextmanager
def accounted() -> Iterator[None]:
    """Prints the summary of the sweep that ran inside. Does nothing for a single run.

    Exits with status 1 if a job failed or did not end, and with 128 and the number of the signal that ended it.
    """
    global _SWEEP  # noqa: PLW0603
    _SWEEP = None
    try:
        yield
    except BaseException as error:
        if _SWEEP is not None:
            _SWEEP.close(interrupted=True)
            number = stop_signals.received()
            if number or isinstance(error, KeyboardInterrupt):  # the launcher's traceback would not help
                sys.exit(stop_signals.exit_status(number))
        raise
    finally:
        sweep, _SWEEP = _SWEEP, None
    if sweep is not None and not sweep.close(interrupted=False):
        sys.exit(1)


def duration(seconds: float) -> str:
    """A time in words: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
