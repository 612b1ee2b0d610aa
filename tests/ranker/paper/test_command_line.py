"""scripts/reproduce.py takes its words in any order."""

from __future__ import annotations

import subprocess
import sys

from support import ROOT


def test_overrides_may_stand_behind_options() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "table1", "--jobs", "1", "data=kuairnd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data=kuairnd: "), "the override was read, and judged"
    assert "kuairand" in done.stderr
