"""Command lines: a mistake of the user's ends in one line and exit status 2, a sweep in its account."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ranker import config
from ranker.errors import UserError
from ranker.sweeps.watch import accounted

FULL_ERROR = "HYDRA_FULL_ERROR"
# Whether the user asked for the stack; the process sets the variable FULL_ERROR for itself.
_STACK_WANTED: ContextVar[bool] = ContextVar("stack wanted by the user", default=False)


def run(main: Callable[[], None]) -> None:
    """Runs a Hydra main so that a mistake of the user's ends in one line and exit status 2.

    The stack is shown with HYDRA_FULL_ERROR=1, as Hydra's own users expect.
    """
    wanted = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # else Hydra prints and exits before the error reaches us
    try:
        with _asked_for_stack(wanted == "1"), one_line_errors(outermost=True), accounted():
            main()
    finally:  # a second call in this process must not take it for the user's wish
        if wanted is None:
            os.environ.pop(FULL_ERROR, None)
        else:
            os.environ[FULL_ERROR] = wanted


@contextmanager
def one_line_errors(*, outermost: bool = False) -> Iterator[None]:
    """Ends the process with one line where what is inside raises a mistake of the user's.

    Also used inside a job, since Hydra announces an error that leaves a job with lines of its own. A job of a
    multirun lets the error pass, so that the launcher sees which job failed.

    Args:
        outermost: nothing is around it that the error could be meant for, whatever job ran last in this process.
    """
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if _STACK_WANTED.get() or (config.is_sweep() and not outermost):
            raise
        print(f"error: {config.one_line(error)}", file=sys.stderr)
        print(f"({FULL_ERROR}=1 shows where)", file=sys.stderr)
        sys.exit(2)


@contextmanager
def _asked_for_stack(wanted: bool) -> Iterator[None]:
    token = _STACK_WANTED.set(wanted)
    try:
        yield
    finally:
        _STACK_WANTED.reset(token)
