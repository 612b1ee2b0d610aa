"""The id of a run in W&B: kept in the run folder, so that a resumed run goes on there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf

from ranker.errors import UserError
from ranker.runs.run_folder import RunFolder
from ranker.training import trackers


def logger_of(folder: Path, *, tracked: int | None = None, **options: Any) -> trackers.Logger:
    run = trackers.Tracked(RunFolder(folder), name="run", group="group", tags=[], tracked=tracked)
    return trackers.weights_and_biases(run, project="evenkeel", **options)


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


def test_a_resumed_run_has_the_rows_after_its_checkpoint_dropped_where_that_is_asked_for(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"seed": 0})
    with trackers.finishing([first := logger_of(tmp_path)]):
        trackers.write_config([first], cfg)
        for step in range(1, 6):
            first.log_metrics({"loss": 1.0 / step}, step=step)
        at_the_checkpoint = trackers.position([first])
        first.log_metrics({"loss": 9.0}, step=6)
    assert at_the_checkpoint == 5

    with trackers.finishing([resumed := logger_of(tmp_path, tracked=at_the_checkpoint, rewind=True)]):
        trackers.write_config([resumed], cfg)
        settings = resumed.experiment.settings
        moment = settings.resume_from
        assert (moment.run, moment.metric, moment.value, settings.resume) == (first.version, "_step", 4, None)
        assert resumed.version == first.version

    for options in ({"tracked": 5}, {"tracked": None, "rewind": True}, {"tracked": 0, "rewind": True}):
        assert "resume_from" not in logger_of(tmp_path, **options)._wandb_init


def test_a_server_that_cannot_rewind_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.Error("cannot rewind a run that is not in a terminal state")

    monkeypatch.setattr(wandb, "init", refuse)
    cfg = OmegaConf.create({"seed": 0})
    with pytest.raises(UserError, match=r"not in a terminal state\); resume with logger.wandb.rewind=false"):
        trackers.write_config([logger_of(tmp_path, tracked=5, rewind=True)], cfg)
    with pytest.raises(wandb.Error, match="terminal"):
        trackers.write_config([logger_of(tmp_path, tracked=5)], cfg)
