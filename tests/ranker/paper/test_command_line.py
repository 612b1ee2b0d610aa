"""scripts/reproduce.py takes its words in any order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ranker.commands import reproduce_command
from support import ROOT


def test_overrides_may_stand_behind_options() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "table1", "--jobs", "1", "data=kuairnd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data=kuairnd: "), "the override was read, and judged"
    assert "kuairand" in done.stderr


def test_a_study_that_another_one_needs_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(reproduce_command, "make", lambda study, *_, **__: made.append(study.name))
    results = tmp_path / "kuairand_laptop"
    results.mkdir()
    words = [
        "fig5",
        "data=kuairand",
        "data.source=nowhere",
        "--results",
        str(tmp_path),
        "--out",
        str(tmp_path / "runs"),
    ]

    assert reproduce_command.reproduce(words) == 0
    for phase in reproduce_command.BY_NAME["table2"].phases:
        (results / f"{phase.name}.csv").touch()
    assert reproduce_command.reproduce(words) == 0
    assert reproduce_command.reproduce(["table2", *words[1:]]) == 0

    assert made == ["table2", "fig5", "fig5", "table2"]
