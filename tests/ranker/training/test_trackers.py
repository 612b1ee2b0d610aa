"""The id of a run in W&B: kept in the run folder, so that a resumed run goes on there."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ranker.runs.run_folder import RunFolder
from ranker.training import trackers


def logger_of(folder: Path) -> trackers.Logger:
    tracked = trackers.Tracked(RunFolder(folder), name="run", group="group", tags=[])
    return trackers.weights_and_biases(tracked, project="evenkeel")


def test_a_resumed_run_has_the_id_of_its_first_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = logger_of(tmp_path)
    assert logger_of(tmp_path).version != first.version, "nothing is written before the run starts"
    monkeypatch.setattr(type(first), "log_hyperparams", lambda self, params: None)

    trackers.write_config([first], OmegaConf.create({"seed": 0}))

    assert logger_of(tmp_path).version == first.version
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    assert logger_of(tmp_path).version == first.version
    assert logger_of(tmp_path / "other").version == "fromagent"
