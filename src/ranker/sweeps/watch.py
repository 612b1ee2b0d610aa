"""A sweep's progress and its account at the end, printed by the process that launches it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ranker.sweeps.jobs_file import combine, read_jobs
from ranker.sweeps.journal import Account, Journal, duration
from ranker.sweeps.launchers import is_parallel

POLL_SECONDS = 1.0


class Sweep:
    """The sweep that this process launches.

    With jobs in other processes a thread prints a line whenever some have ended; with jobs in this one a line follows
    each job, where it does not tear the job's own bar.

    Args:
        folder: the sweep's folder.
        jobs: how many jobs; None where unknown.
        parallel: whether they run in other processes.
        line_seconds: least time between two lines of the thread.
    """

    def __init__(self, folder: Path, *, jobs: int | None, parallel: bool, line_seconds: float) -> None:
        self.folder, self.parallel = folder, parallel
        self._journal = Journal(folder)
        self._journal.begin(jobs)
        self._line_seconds = line_seconds
        self._told = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        if parallel:
            self._thread.start()

    def tell(self) -> None:
        """Prints where the sweep is."""
        account = self._journal.read()
        self._told = account.done
        print(account.line(time.time()), flush=True)

    def close(self) -> Account:
        """Stops watching."""
        self._ended.set()
        if self.parallel:
            self._thread.join()
        return self._journal.read()

    def _follow(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            if time.monotonic() - last >= self._line_seconds and self._journal.read().done != self._told:
                last = time.monotonic()
                self.tell()


_SWEEP: Sweep | None = None  # of this process; a worker's stays None


class SweepWatch(Callback):
    """Hydra's callback: opens the account of a multirun, and prints a line after each job of this process.

    Args:
        line_seconds: least time between two lines about jobs in other processes.
    """

    def __init__(self, line_seconds: float = 15.0) -> None:
        self._line_seconds = line_seconds

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before the first job."""
        global _SWEEP  # noqa: PLW0603  (Hydra makes this object, and pickles it into the workers: it can hold nothing)
        _SWEEP = Sweep(
            Path(config.hydra.sweep.dir),
            jobs=count_jobs(config),
            parallel=is_parallel(config.hydra.launcher),
            line_seconds=self._line_seconds,
        )

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """After each job of this process."""
        if _SWEEP is not None and not _SWEEP.parallel:
            _SWEEP.tell()


@contextmanager
def accounted() -> Iterator[None]:
    """Ends a sweep with its account: what became of its jobs, and each that failed with its reason.

    Exits with status 1 where a job failed or never ended. Does nothing for a single run.
    """
    global _SWEEP  # noqa: PLW0603
    _SWEEP = None
    try:
        yield
    except BaseException as error:
        if _SWEEP is not None:
            _close(_SWEEP, broken_off=True)
            if isinstance(error, KeyboardInterrupt):
                sys.exit(130)  # as a shell says it; where the launcher was waiting is nobody's concern
        raise
    finally:
        sweep, _SWEEP = _SWEEP, None
    if sweep is not None and not _close(sweep, broken_off=False):
        sys.exit(1)


def count_jobs(config: DictConfig) -> int | None:
    """How many jobs a sweep has; None where only its sweeper could say."""
    sweeper = config.hydra.sweeper
    if "n_trials" in sweeper:
        return int(sweeper.n_trials)
    kind = str(sweeper.get("_target_", "")).rpartition(".")[2]
    if kind not in ("BasicSweeper", "ListSweeper"):
        return None
    with suppress(Exception):  # whatever is wrong with an override, the sweeper itself says it better, and at once
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
        return len(combine(jobs, read_jobs(sweeper.jobs)) if kind == "ListSweeper" else jobs)
    return None


def _close(sweep: Sweep, *, broken_off: bool) -> bool:
    account = sweep.close()
    if broken_off and not account.states:
        return False  # refused before its first job: the error says all there is to say
    now = time.time()
    print(f"{account.line(now)} in {duration(now - account.began)}: {sweep.folder}", flush=True)
    for run, reason in account.failures:
        print(f"failed: {run}: {reason}", file=sys.stderr, flush=True)
    # A sweeper that returned may have launched fewer jobs than it was allowed, such as a grid smaller than n_trials.
    missing = account.missing if broken_off else account.count("started")
    if missing:
        print(f"{missing} jobs did not end; the same command does what is missing", file=sys.stderr, flush=True)
    return not account.failures and not missing
