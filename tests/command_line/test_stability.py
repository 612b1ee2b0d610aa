"""``python scripts/stability.py`` end to end: short runs, one number, and a second call that makes none again."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from support import ROOT, TINY


def call(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    script = ROOT / "scripts" / "stability.py"
    monkeypatch.setattr(sys, "argv", [str(script), *overrides])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0


def test_one_number_before_the_long_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [word for word in TINY if not word.startswith(("logger", "train.eval_every"))]
    given += ["optim=adagrad", "train.max_steps=12", "headroom.seeds=1", "headroom.lowest=1", "headroom.highest=1e5"]
    given += ["headroom.step=1e5", "headroom.tolerance=1e6", "callbacks.divergence.settings.nonfinite_patience=3"]

    call(monkeypatch, *given)

    out = capsys.readouterr().out
    assert "lr headroom: 316x [1x, 1e+05x]" in out  # half way between, in log lr
    (entry,) = json.loads((tmp_path / "headroom" / "headroom.json").read_text())["entries"]
    rates = [run["rate"] for run in entry["runs"]]
    assert rates == [1.0, 1e5]
    summaries = sorted(tmp_path.glob("headroom/*/summary.json"))
    assert len(summaries) == len(rates)
    assert all(json.loads(path.read_text())["steps"] <= 12 for path in summaries)
    written = {path: path.stat().st_mtime_ns for path in summaries}

    call(monkeypatch, *given)

    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("headroom/*/summary.json")} == written
    assert f"{len(rates)} done before" in capsys.readouterr().out
