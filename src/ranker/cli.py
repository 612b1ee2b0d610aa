"""What all commands share: a mistake of the user ends in one line and exit status 2, a sweep in its summary."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ranker import config, stop_signals
from ranker.errors import UserError, disk_trouble
from ranker.hydra_private import composed_once
from ranker.installation import conf_folder
from ranker.runs import run_lock
from ranker.runs.run_folder import RUN_DIR_VARIABLE
from ranker.sweeps.watch import accounted

MISTAKES = (UserError, HydraException, OmegaConfBaseException)  # of the user
FULL_ERROR = "HYDRA_FULL_ERROR"
NOT_BY_USER = "EVENKEEL_SETS_FULL_ERROR"  # tells the ranks that a run starts that run() has set FULL_ERROR
# Whether the user asked for the stack. The environment variable does not say, because run() sets it.
_STACK_WANTED: ContextVar[bool] = ContextVar("stack wanted by the user", default=False)


Arguments = ParamSpec("Arguments")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--trust NAME`` of commands that build what a saved configuration names."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="TARGET",
        help="a class or function of yours that the saved config.yaml may run, such as my_parts.MyCallback; several "
        "times for several",
    )


def command(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Decorates the main function of a command so that it returns 2 after a mistake of the user, with one line.

    The stack is shown with HYDRA_FULL_ERROR=1.

    Args:
        main: returns the exit status.
    """

    @functools.wraps(main)
    def checked(*args: Arguments.args, **options: Arguments.kwargs) -> int:
        try:
            return main(*args, **options)
        except MISTAKES as error:
            if os.environ.get(FULL_ERROR) == "1":
                raise
            print(f"error: {config.one_line(error)}", file=sys.stderr)
            return 2
        except OSError as error:
            line = disk_trouble(error)
            if not line or os.environ.get(FULL_ERROR) == "1":
                raise
            print(f"error: {line}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return checked


def run(main: Callable[[], None]) -> None:
    """Runs a Hydra main so that a mistake of the user ends in one line and exit status 2.

    The stack is shown with HYDRA_FULL_ERROR=1, as Hydra's own users expect.
    """
    wanted = None if NOT_BY_USER in os.environ else os.environ.get(FULL_ERROR)
    if wanted != "1":
        os.environ[NOT_BY_USER] = "1"
    os.environ[FULL_ERROR] = "1"  # else Hydra prints and exits before the error reaches us
    try:
        with (
            stop_signals.one_line(),
            _asked_for_stack(wanted == "1"),
            one_line_errors(outermost=True),
            accounted(),
            composed_once(sys.argv[1:], conf_folder()),
        ):
            main()
    finally:  # a second call in this process must not take it for the user's wish
        os.environ.pop(NOT_BY_USER, None)
        if wanted is None:
            os.environ.pop(FULL_ERROR, None)
        else:
            os.environ[FULL_ERROR] = wanted


@contextmanager
def one_line_errors(*, outermost: bool = False) -> Iterator[None]:
    """Ends the process with one line and status 2 where the user or the disk is at fault.

    Also used inside a job, because Hydra adds lines of its own to an error that leaves a job. In a job of a multirun
    the error passes, so that the launcher sees which job failed.

    Args:
        outermost: no caller handles the error, so it never passes, whatever job ran last in this process.
    """
    try:
        yield
    except (*MISTAKES, OSError) as error:
        if stop_signals.cut_short():
            raise stop_signals.Stopped from error
        line = disk_trouble(error)
        if not line and isinstance(error, MISTAKES):  # one of Hydra's errors is an OSError too
            line = config.one_line(error)
        if not line or _STACK_WANTED.get() or (config.is_sweep() and not outermost):
            raise
        print(f"error: {line}", file=sys.stderr)
        print(f"({FULL_ERROR}=1 shows where)", file=sys.stderr)
        sys.exit(2)


@contextmanager
def no_folder_of_a_mistake() -> Iterator[None]:
    """Removes the folder that Hydra made for a run, if a mistake of the user ends it before anything is in there."""
    try:
        yield
    except MISTAKES:
        if RUN_DIR_VARIABLE not in os.environ:  # else another process of the run made it
            folder = Path(HydraConfig.get().runtime.output_dir)
            files = [path for path in folder.rglob("*") if not path.is_dir()]
            log = folder / f"{HydraConfig.get().job.name}.log"
            if all(
                x.parent.name == ".hydra" or x.name == run_lock.LOCK or (x == log and not x.stat().st_size)
                for x in files
            ):
                with suppress(UserError), run_lock.held(folder):  # another run may just begin in there
                    shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _asked_for_stack(wanted: bool) -> Iterator[None]:
    token = _STACK_WANTED.set(wanted)
    try:
        yield
    finally:
        _STACK_WANTED.reset(token)
