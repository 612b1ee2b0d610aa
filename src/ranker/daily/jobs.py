"""The two kinds of work of a day, each in a process of its own: training, and judging."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ranker.daily.judge import Request
from ranker.installation import train_file

OUTPUT = "output.txt"
_STOP_SECONDS = 600.0  # for the checkpoint of a run that is asked to stop


class Jobs(Protocol):
    """What a day needs done. Both return the exit status of the process; output goes to a file."""

    def train(self, words: Sequence[str], output: Path) -> int:
        """Runs ``train.py`` with some arguments."""
        ...

    def judge(self, request: Request, output: Path) -> int:
        """Answers a request of ``ranker.daily.judge``."""
        ...


class Processes:
    """Starts the jobs as processes. A signal that asks to stop is passed on, and the job ends as it does by itself."""

    def train(self, words: Sequence[str], output: Path) -> int:
        """Runs ``train.py``."""
        return _wait([sys.executable, str(train_file()), *words], output)

    def judge(self, request: Request, output: Path) -> int:
        """Runs ``ranker.daily.judge``."""
        path = Path(request.answer).with_suffix(".request.json")
        request.write(path)
        return _wait([sys.executable, "-m", "ranker.daily.judge", str(path)], output)


def last_error(output: Path) -> str:
    """Why a job failed: the line that it ended with, or its last one."""
    try:
        lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else next((line for line in reversed(lines) if line), "")


def _wait(arguments: list[str], output: Path) -> int:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        return process.wait()
    except BaseException:
        # Never SIGINT: a terminal has sent it to the job too, and a second one would end it before its checkpoint.
        with suppress(OSError):
            os.kill(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        raise
