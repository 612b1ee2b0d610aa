"""Which checkpoint a run that was lost goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ranker.errors import UserError
from ranker.runs.checkpoint_files import path_of
from ranker.runs.run_folder import RunFolder
from ranker.training.resumption import sound_checkpoint


def lost_run(
    folder: Path, steps: list[int], *, first: int | None, rollbacks: list[dict[str, Any]] | None = None
) -> Path:
    """A folder with a checkpoint per step; the newest one knows of a divergence since ``first``."""
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        full = {"step": first} if first is not None and step == max(steps) else None
        stability = {"detector": {"classifier": {"full_divergence": full}}, "rollbacks": rollbacks or []}
        torch.save({"callbacks": {"Stability": stability}}, path_of(folder / "checkpoints", step))
    return folder


def chosen(folder: Path, *, keep_lost: bool = False) -> tuple[int, list[str]]:
    said: list[str] = []
    path = sound_checkpoint(RunFolder(folder), keep_lost=keep_lost, say=said.append)
    return int(path.stem.removeprefix("step=")), said


def test_a_run_that_was_not_lost_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    assert chosen(lost_run(tmp_path, [100, 200], first=None)) == (200, [])


def test_a_lost_one_goes_back_to_before_its_divergence(tmp_path: Path) -> None:
    step, (line,) = chosen(lost_run(tmp_path, [60, 75, 80], first=61))
    assert step == 60
    assert "diverged at step 61; going back to step 60" in line
    step, (line,) = chosen(tmp_path, keep_lost=True)
    assert step == 80
    assert "going on from step 80 with the lost weights" in line
    path_of(tmp_path / "checkpoints", 60).write_bytes(b"damaged")
    with pytest.raises(UserError, match="no checkpoint from before that is kept"):
        chosen(tmp_path)


def test_a_checkpoint_of_steps_that_a_rollback_undid_is_not_from_before(tmp_path: Path) -> None:
    lost_run(tmp_path, [200, 260], first=252, rollbacks=[{"step": 250, "to_step": 0}])
    with pytest.raises(UserError, match="no checkpoint from before that is kept"):
        chosen(tmp_path)
    lost_run(tmp_path / "later", [200, 260], first=252, rollbacks=[{"step": 190, "to_step": 150}])
    assert chosen(tmp_path / "later")[0] == 200


def test_the_verdict_of_the_hold_out_counts_too(tmp_path: Path) -> None:
    lost_run(tmp_path, [100, 200], first=None)
    (tmp_path / "summary.json").write_text(json.dumps({"status": "diverged"}))
    (tmp_path / "events.jsonl").write_text('{"kind": "micro", "step": 20}\n{"kind": "full", "step": 150}\n')
    assert chosen(tmp_path)[0] == 100
