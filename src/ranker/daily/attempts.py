"""One attempt at a day: a run folder that is trained to its end, however often the process is killed on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ranker.atomic import write_text
from ranker.config_overrides import quoted
from ranker.daily.jobs import OUTPUT, Jobs, last_error
from ranker.daily.settings import Retry
from ranker.errors import UserError
from ranker.runs import run_lock
from ranker.runs.checkpoint_files import by_step
from ranker.runs.run_folder import CAPSULES, CHECKPOINTS, CONFIG, FINISHED, read_summary

PLAN = "plan.json"
Say = Callable[[str], None]


class JobFailedError(Exception):
    """A job ended without a result: a mistake in the configuration or the data, no memory, a kill.

    Attributes:
        by_user: the job said that the user is at fault.
    """

    def __init__(self, line: str, *, by_user: bool) -> None:
        super().__init__(line)
        self.by_user = by_user


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a day is trained on. Written before its first attempt, so that a restart goes on with the same.

    Attributes:
        day: the day; of the first model, the last of its days.
        first: first day that is trained on, usually the day itself.
        after: the day on which the model is judged.
        parent: run folder, export or checkpoint that it starts from; None for random weights.
        files: the files of the days first .. day, with checksums.
        judged: the files of the day after.
        drift: what the drift guard found.
    """

    day: str
    first: str
    after: str
    parent: str | None
    files: Mapping[str, str]
    judged: Mapping[str, str]
    drift: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Writes plan.json."""
        write_text(folder / PLAN, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """Reads plan.json; None if there is none."""
        path = folder / PLAN
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A finished run of a day.

    Attributes:
        run: its folder.
        number: 1 for the first.
        changes: what differs from the configuration, in words.
        summary: the content of summary.json.
    """

    run: Path
    number: int
    changes: str
    summary: dict[str, Any]

    @property
    def lost(self) -> bool:
        """Whether the model was lost."""
        return self.summary["status"] == "diverged"

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """For days.jsonl."""
        capsules = sorted((self.run / CAPSULES).glob("step=*")) if (self.run / CAPSULES).is_dir() else []
        return {
            "try": self.number,
            "changes": self.changes,
            "run": str(self.run.relative_to(folder)),
            "status": self.summary["status"],
            "reason": self.summary["reason"],
            "capsules": [str(path.relative_to(folder)) for path in capsules] if self.lost else [],
        }


def attempt(run: Path, words: Sequence[str], *, number: int, retry: Retry | None, jobs: Jobs, say: Say) -> Attempt:
    """Trains a run to its end. A run that is finished is read, one that was interrupted goes on.

    Args:
        run: its folder.
        words: from ``train_words``.
        number: of the attempt.
        retry: what changes; None for the first attempt.
        jobs: starts the processes.
        say: shows a line.

    Raises:
        JobFailedError: the run ended without a result.
    """
    output = run.with_name(f"{run.name}.{OUTPUT}")
    summary = read_summary(run)
    if summary is None or summary["status"] not in FINISHED:
        _wait_for_orphan(run, say)
        status = jobs.train(words, output)
        summary = read_summary(run)
        if status or summary is None or summary["status"] not in FINISHED:
            why = last_error(output) or f"exit status {status}"
            raise JobFailedError(f"training failed: {why} ({output})", by_user=status == 2)
    return Attempt(run=run, number=number, changes=str(retry) if retry else "as configured", summary=summary)


def replaced(words: Sequence[str], new: Sequence[str]) -> list[str]:
    """Arguments with others in place of those that set the same."""
    keys = {word.split("=", 1)[0] for word in new}
    return [word for word in words if word.split("=", 1)[0].lstrip("+~") not in keys] + list(new)


def train_words(
    run: Path, plan: Plan, *, words: Sequence[str], flags: Sequence[str], retry: Retry | None, lr_mult: float
) -> list[str]:
    """The arguments of ``train.py`` for an attempt: to go on where it has a checkpoint, otherwise to begin.

    Args:
        run: the folder of the attempt.
        plan: what it is trained on.
        words: the user's overrides.
        flags: other arguments.
        retry: what changes; None for the first attempt.
        lr_mult: as configured.
    """
    if (run / CONFIG).is_file() and by_step(run / CHECKPOINTS):
        return [*flags, f"resume={quoted(str(run))}", *(word for word in words if word.startswith("trust="))]
    own = [
        f"data.days=[{plan.first},{plan.after}]",
        "data.eval_days=1",
        "data.hold_out=null",
        f"hydra.run.dir={quoted(str(run))}",
        "hydra.output_subdir=null",
        f"force={'true' if run.is_dir() else 'false'}",
    ]
    if plan.parent is not None:
        own.append(f"warm_start.path={quoted(plan.parent)}")
    if retry is not None:
        own += [f"lr_mult={lr_mult * retry.lr_factor!r}"] if retry.lr_factor != 1 else []
        own += [f"warm_start.accumulators={retry.accumulators}"] if retry.accumulators and plan.parent else []
        own += [f"optim={retry.optim}"] if retry.optim else []
    return [*flags, *replaced(words, own)]


def _wait_for_orphan(run: Path, say: Say) -> None:
    """Waits for a process that still trains in the folder, because only the one that had started it was killed."""
    if not run.is_dir():
        return
    try:
        with run_lock.held(run):
            return
    except UserError as error:
        say(f"waiting: {error}")
    with run_lock.held(run, wait=True):
        pass
