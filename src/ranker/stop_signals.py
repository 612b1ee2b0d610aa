"""Requests to stop: the signals that ask for it, and what they do while a process starts and while it trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal ends the work. Like Ctrl-C it is no ``Exception``, so that no handler of errors keeps it."""


@dataclass
class _State:
    taken: bool = False  # our handler is installed
    gentle: bool = False  # the work looks at received() and ends by itself
    quiet: bool = False  # another process of the run speaks
    received: int = 0  # the first signal; 0 for none
    cut: bool = False  # Stopped was raised wherever the work was


_STATE = _State()


def received() -> int:
    """The number of the first signal that asked this process to stop; 0 if none did."""
    return _STATE.received


def cut_short() -> bool:
    """Whether ``Stopped`` was raised at any place, so that an error may be its consequence, and no mistake."""
    return _STATE.cut


def exit_status(number: int) -> int:
    """The exit status after a signal: 128 and its number, as shells have it."""
    return 128 + (number or signal.SIGINT)


def name_of(number: int) -> str:
    """The name of a signal, such as SIGTERM."""
    return signal.Signals(number or signal.SIGINT).name


@contextmanager
def taken_over() -> Iterator[None]:
    """Handles the signals in this block. Does nothing in a block inside another, or outside the main thread.

    A signal raises ``Stopped``, as long as nothing has begun that a stop would damage. After ``gently`` the first one
    is noted, and the work ends where it is safe; a second Ctrl-C raises. A signal that is ignored, as nohup ignores
    SIGHUP, stays ignored.
    """
    if _STATE.taken or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    _STATE.taken, _STATE.received, _STATE.cut, _STATE.quiet = True, 0, False, not _speaks()
    try:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, _handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _STATE.taken = _STATE.gentle = _STATE.quiet = _STATE.cut = False


@contextmanager
def gentle_after_start() -> Iterator[None]:
    """Ends the gentle handling, if ``gently`` began it in this block."""
    try:
        yield
    finally:
        _STATE.gentle = False


def gently() -> None:
    """From now on the work looks at ``received`` and ends by itself."""
    _STATE.gentle = True


@contextmanager
def one_line() -> Iterator[None]:
    """Ends the process with one line and the status of the signal, where a signal ends the block."""
    with taken_over():
        try:
            yield
        except (KeyboardInterrupt, Exception) as error:
            # A library may make an error of its own of a Stopped in it: OmegaConf did while Hydra was imported.
            if isinstance(error, Exception) and not _STATE.cut:
                raise
            number = _STATE.received
            say(f"stopped by {name_of(number)} before training began; nothing was lost")
            sys.exit(exit_status(number))


def say(line: str) -> None:
    """Prints a line to standard error, if there is still somebody to read it."""
    if not _STATE.quiet:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def _handle(number: int, _: FrameType | None) -> None:
    first = not _STATE.received
    _STATE.received = _STATE.received or number
    if number == signal.SIGHUP:
        _leave_terminal()
    if not first:
        if number == signal.SIGINT:
            raise Stopped
        return
    if _STATE.gentle:
        again = "; a second Ctrl-C stops at once" if number == signal.SIGINT else f" ({name_of(number)})"
        say(f"\nstopping after this step{again}")
        return
    workers = multiprocessing.active_children()  # of a launcher that runs a sweep's jobs in parallel
    for worker in workers:
        with suppress(OSError):
            os.kill(worker.pid or 0, signal.SIGTERM)  # a worker's error ends the launcher
    if not workers:
        _STATE.cut = True
        raise Stopped


def _speaks() -> bool:
    """Whether this is the first process of a run; the others are started with their number in a variable."""
    # torchrun sets RANK, which counts over all machines; Lightning LOCAL_RANK alone; srun SLURM_PROCID.
    given = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ]
    return not given or given[0] == "0"


def _leave_terminal() -> None:
    """Sends further output nowhere: the terminal is gone, and writing to it would fail."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            if os.isatty(stream):
                os.dup2(nowhere, stream)
        os.close(nowhere)
