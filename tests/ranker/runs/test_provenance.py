from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ranker.runs import provenance


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch):
    """Asks for the commit as if the module lay in a folder."""

    def ask(folder: Path) -> str | None:
        if not (folder / "provenance.py").exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(provenance.__file__, folder)
        monkeypatch.setattr(provenance, "__file__", str(folder / "provenance.py"))
        return provenance.commit.__wrapped__()

    return ask


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_says_where_tracked_files_were_changed(tmp_path: Path, at) -> None:
    git(tmp_path, "init")
    assert at(tmp_path / "src") is None  # installed into somebody else's checkout: not tracked
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "-m", "one")

    clean = at(tmp_path / "src")
    assert clean
    assert re.fullmatch("[0-9a-f]{12}", clean)
    with (tmp_path / "src" / "provenance.py").open("a") as file:
        file.write("# changed\n")
    assert at(tmp_path / "src") == f"{clean}-dirty"


def test_there_is_no_commit_outside_a_checkout(tmp_path: Path, at) -> None:
    assert at(tmp_path) is None


def test_the_machine_is_said_in_a_line() -> None:
    assert re.search(r"\d+ cores.*torch \d", provenance.machine())
