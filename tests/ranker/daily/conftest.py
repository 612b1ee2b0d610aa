"""Daily training in this process: the jobs are called instead of started, which saves the time of the imports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from daily_log import pass_everything, words_for
from ranker.commands.daily_command import daily
from ranker.daily.judge import Request, answer
from ranker.errors import UserError


class Here:
    """Does the jobs in this process."""

    def __init__(self, command_line: Callable[..., None]) -> None:
        self._command_line = command_line
        self.trained: list[list[str]] = []

    def train(self, words: Sequence[str], output: Path) -> int:
        self.trained.append(list(words))
        try:
            self._command_line(*words)
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    def judge(self, request: Request, output: Path) -> int:
        try:
            answer(request)
        except UserError as error:
            output.write_text(f"error: {error}\n")
            return 2
        return 0


@pytest.fixture
def jobs(command_line: Callable[..., None]) -> Here:
    return Here(command_line)


@pytest.fixture
def call(jobs: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``scripts/daily.py`` on tmp_path/log into tmp_path/daily."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, doing: Any = None) -> int:
        return daily([*words_for(tmp_path), *words], jobs=doing or jobs)

    return run


@pytest.fixture
def easy_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows teach little, and an export takes seconds: the gate passes everything, and no program is traced."""
    pass_everything(monkeypatch)
