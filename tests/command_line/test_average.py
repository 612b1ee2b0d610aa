"""``train.average_decay``: the average is evaluated, kept through kills, rollbacks and days, and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from daily_log import SETTINGS, name_of, write_log
from ranker.export.release import Weights
from ranker.runs.checkpoint_files import by_step
from support import assert_equal, finished

Command = Callable[..., None]
AVERAGED = "train.average_decay=0.8"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), 3)


def train(command: Command, log: Path, folder: Path, first: int, last: int, *words: str) -> dict[str, Any]:
    days = f"data.days=[{name_of(first)},{name_of(last + 1)}]"
    command(*SETTINGS, f"data.source={log}", days, f"hydra.run.dir={folder}", *words)
    return torch.load(by_step(folder / "checkpoints")[-1], weights_only=True)


def test_the_average_is_that_of_the_steps_and_training_does_not_see_it(
    command_line: Command, log: Path, tmp_path: Path
) -> None:
    plain = train(command_line, log, tmp_path / "plain", 0, 0, "train.max_steps=3", "train.checkpoint_every=1")
    made = train(command_line, log, tmp_path / "made", 0, 0, "train.max_steps=3", "train.checkpoint_every=1", AVERAGED)
    assert_equal(plain["state_dict"], made["state_dict"])
    assert plain["lineage"] == made["lineage"]
    assert not any(name.startswith("embeddings.") for name in made["average"])
    name = "bottom.layers.1.weight"
    steps = [
        torch.load(path, weights_only=True)
        for path in by_step(tmp_path / "made" / "checkpoints")  # the last two
    ]
    before, after = steps[-2]["average"][name], steps[-1]["average"][name]
    torch.testing.assert_close(after, 0.8 * before + 0.2 * made["state_dict"][f"net.{name}"])
    assert not torch.equal(after, made["state_dict"][f"net.{name}"])
    one, other = finished(tmp_path / "plain").summary, finished(tmp_path / "made").summary
    assert one["metrics"] != other["metrics"]  # the average is evaluated
    assert one["config_hash"] != other["config_hash"]
    exported = Weights.read(by_step(tmp_path / "made" / "checkpoints")[-1])
    assert exported.averaged
    assert_equal(after, exported.net[name])
    assert_equal(
        made["state_dict"]["net.embeddings.tables.dim_4.weight"], exported.net["embeddings.tables.dim_4.weight"]
    )


def test_the_average_goes_on_over_a_kill_and_over_days(command_line: Command, log: Path, tmp_path: Path) -> None:
    whole = train(command_line, log, tmp_path / "whole", 0, 1, AVERAGED)
    train(command_line, log, tmp_path / "0", 0, 0, AVERAGED)
    half = tmp_path / "1"
    train(command_line, log, half, 1, 1, AVERAGED, f"warm_start={tmp_path / '0'}", "train.max_steps=6")
    command_line(f"resume={half}", "train.max_steps=-1")
    daily = torch.load(by_step(half / "checkpoints")[-1], weights_only=True)
    assert_equal(whole["average"], daily["average"])
    assert_equal(whole["state_dict"], daily["state_dict"])
    assert finished(tmp_path / "whole").summary["metrics"] == finished(half).summary["metrics"]


def test_a_wrong_decay_is_one_line(
    command_line: Command, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(command_line, log, tmp_path / "run", 0, 0, "train.average_decay=1.5")
    assert "train.average_decay must be 0 (none) or below 1" in capsys.readouterr().err
