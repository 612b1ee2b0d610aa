"""The console command: every command is listed, and a mistake of the user exits with status 2 and one line."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ranker.commands import console
from support import ROOT, TINY, TWO_RANKS

MISTAKES = [
    ("prepare kuairand /nowhere {tmp}/out", "/nowhere"),
    ("download kuairand-pure {tmp}", "--yes"),
    ("inspect /nowhere", "no schema.yaml in /nowhere"),
    ("report /nowhere", "/nowhere"),
    ("compare /nowhere", "/nowhere"),
    ("compare /nowhere.csv", "no file /nowhere.csv"),
    ("plot /nowhere --task click", "/nowhere"),
    ("replay /nowhere", "/nowhere"),
    ("export /nowhere", "no config.yaml in /nowhere"),
    ("score /nowhere {tmp}/rows.parquet --out {tmp}/scores.parquet", "/nowhere"),
    ("reproduce table9", "unknown table or figure 'table9'"),
    ("reproduce table1 data=kuairnd", "did you mean 'kuairand'"),
    ("trian", "unknown command 'trian'; did you mean 'train'"),
]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of ``evenkeel WORDS`` in this process."""
    monkeypatch.setattr(sys, "argv", ["evenkeel", *words])
    try:
        return console.main()
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize(("line", "what"), MISTAKES, ids=[line.split(" /")[0] for line, _ in MISTAKES])
def test_a_mistake_exits_with_2_and_one_line(
    line: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)

    assert call(monkeypatch, *line.format(tmp=tmp_path).split()) == 2

    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    assert what in error


def test_a_mistake_in_training_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", "model=larg", f"hydra.run.dir={tmp_path}") == 2
    assert "did you mean 'large'" in capsys.readouterr().err


def test_every_command_exists_and_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch) == 0

    listed = capsys.readouterr().out
    for name, (module, function, description) in console.COMMANDS.items():
        assert callable(getattr(importlib.import_module(f"ranker.commands.{module}"), function))
        assert f"  {name} " in listed
        assert description in listed


def test_a_mistake_in_a_script_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "compare_runs.py"), "/nowhere"], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")


@pytest.mark.slow
def test_training_on_two_processes_from_another_folder(tmp_path: Path) -> None:
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import sys; from ranker.commands.console import main; sys.exit(main())"]
    overrides = [*TINY, *TWO_RANKS, "train.max_steps=3", "train.eval_every=0", "hydra.run.dir=run"]
    done = subprocess.run(
        [*command, "train", *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"world_size": 2' in (tmp_path / "run" / "summary.json").read_text()
