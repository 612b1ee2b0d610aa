from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ranker.errors import UserError
from ranker.training.run_folder import RunFolder, versions


def test_the_saved_configuration_is_resolved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.save_config(OmegaConf.create({"width": 64, "hidden": ["${width}", "${width}"]}))

    assert folder.load_config().hidden == [64, 64]
    assert "${" not in (folder.path / "config.yaml").read_text()


def test_a_summary_with_nan_is_still_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_summary({"metrics": {"a/auc": math.nan, "b/auc": 0.7}, "list": [math.inf]})

    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "metrics": {"a/auc": None, "b/auc": 0.7},
        "list": [None],
    }


def test_events_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (5, 15, 25):
        folder.append_event({"kind": "micro", "step": step})
    folder.keep_events_until(15)

    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 15]


def test_the_newest_checkpoint_is_found_and_its_absence_is_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        folder.newest_checkpoint()
    folder.checkpoints.mkdir()
    for name in ("step=900.ckpt", "step=1000.ckpt"):
        (folder.checkpoints / name).touch()

    assert folder.newest_checkpoint().name == "step=1000.ckpt"


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        RunFolder.existing(tmp_path)


def test_versions_name_what_decides_the_numbers() -> None:
    assert versions()["torch"].startswith("2.")
