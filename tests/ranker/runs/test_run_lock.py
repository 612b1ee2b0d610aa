from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ranker.errors import UserError
from ranker.runs.run_lock import held
from support import ROOT

HOLD = """
import sys
from pathlib import Path
from ranker.runs.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=environment, text=True, stdin=-1, stdout=-1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match=f"is in use by process {process.pid} on "), held(tmp_path):
            pass
    finally:
        process.kill()  # however it ends, the lock is free
        process.communicate()
    with held(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()


def test_the_job_of_a_sweep_and_its_run_hold_the_lock_together(tmp_path: Path) -> None:
    with held(tmp_path), held(tmp_path / "."):
        pass
    with held(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: No such file or directory"), held(tmp_path / "missing"):
        pass
