"""The benchmark of daily training under load, small: killed on the way, the same weights, memory that does not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_days_that_are_killed_end_with_the_weights_of_days_that_are_not(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "bench_daily.py"), "--days", "3", "--rows", "20000"]
    command += ["--kills", "3", "--batch", "512", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 3
    assert found["tensors_that_differ"] == []
    assert found["tensors_compared"] > 40
    assert len(found["memory_mb_by_day"]) >= 3
