"""An explicit list of jobs, read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from ranker.errors import UserError


def read_jobs(path: str | Path) -> list[list[str]]:
    """The jobs of a YAML or JSON file: a list whose entries are lists of overrides.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"hydra.sweeper.jobs: no file {path}; give a YAML or JSON list of lists of overrides")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise UserError(f"hydra.sweeper.jobs: {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, list) or not found:
        raise UserError(f"hydra.sweeper.jobs: {path} must hold a list of lists of overrides, and at least one")
    for number, job in enumerate(found):
        if not isinstance(job, list) or not all(isinstance(item, str) and "=" in item for item in job):
            raise UserError(f"hydra.sweeper.jobs: entry {number} of {path} must be a list such as [optim=gc, seed=1]")
    return found


def combine(common: Sequence[Sequence[str]], jobs: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each job with each set of common overrides; a job's own value of a key wins, and a job listed twice runs once."""
    combined: dict[tuple[str, ...], None] = {}
    for job in jobs:
        own = {_key(override) for override in job}
        for overrides in common:
            kept = [override for override in overrides if _key(override) not in own]
            combined[(*kept, *job)] = None
    return [list(job) for job in combined]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")
