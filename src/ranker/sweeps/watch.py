"""Progress lines of a sweep, made from its journal, and the account at its end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ranker import stop_signals
from ranker.errors import UserError
from ranker.hydra_private import announce_only
from ranker.sweeps.job_list import check_options, count_jobs, is_parallel, jobs_of, wants_groups
from ranker.sweeps.journal import Journal, duration

POLL_SECONDS = 1.0


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
        """Prints one line, if jobs have ended since the last one."""
        account = self._journal.read()
        if account.done == self._printed:  # a job that a group had trained
            return
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
        try:
            check_options(config)
        except UserError as error:  # Hydra turns an error in a callback into a warning, but lets an exit pass
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        _SWEEP = Sweep(
            Path(config.hydra.sweep.dir),
            jobs=count_jobs(config),
            parallel=is_parallel(config.hydra.launcher),
            line_seconds=self._line_seconds,
        )
        if wants_groups(config):
            from ranker.sweeps.vectorize import train_groups  # imported late: few sweeps need it

            train_groups(config, jobs_of(config))

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
        announce_only(None)
        sweep, _SWEEP = _SWEEP, None
    if sweep is not None and not sweep.close(interrupted=False):
        sys.exit(1)
