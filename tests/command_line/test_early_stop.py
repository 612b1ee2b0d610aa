"""``callbacks.early_stop``: a run whose next windows are predicted ever worse ends, with the weights from before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from daily_log import DAY_MS, SETTINGS, name_of, write_day, write_log
from ranker.errors import UserError
from ranker.runs.checkpoint_files import by_step
from ranker.training.early_stop import EarlyStop
from support import assert_equal, finished, metrics

Command = Callable[..., None]
STOP = (
    "callbacks.early_stop.patience=2",
    "callbacks.early_stop.tolerance=0.3",
    "callbacks.snapshots.every=4",
    "callbacks.snapshots.keep=20",
)


def turned(rows: pl.DataFrame) -> pl.DataFrame:
    """Ten times as many rows, whose click follows from the price, and is turned around in the last third of the day."""
    rows = pl.concat([rows] * 10).sort("ts")
    click = (pl.col("price") > 0.5) ^ ((pl.col("ts") % DAY_MS) >= DAY_MS * 2 // 3)
    return rows.with_columns(click.cast(pl.Int8).alias("click"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_log(tmp_path_factory.mktemp("log"), 0)
    for day in range(2):
        write_day(root, day, turned)
    return root


def train(command: Command, log: Path, folder: Path, *words: str) -> dict[str, Any]:
    days = f"data.days=[{name_of(0)},{name_of(1)}]"
    settings = (*SETTINGS, "data.window=2h", "data.tasks=[click]", "data.base_lr.laptop=0.3", "train.log_every=1")
    command(*settings, f"data.source={log}", days, f"hydra.run.dir={folder}", *words)
    return torch.load(by_step(folder / "checkpoints")[-1], weights_only=True)


def test_a_day_that_turns_ends_with_the_weights_from_before(command_line: Command, log: Path, tmp_path: Path) -> None:
    stopped = train(command_line, log, tmp_path / "stopped", *STOP)
    summary = finished(tmp_path / "stopped").summary
    assert summary["status"] == "completed"
    assert "stopped early at step" in summary["reason"]
    back = int(summary["reason"].rsplit(" ", 1)[1])
    scored = [int(row["step"]) for row in metrics(tmp_path / "stopped") if row.get("progressive/click/ne")]
    assert back <= scored[-2]  # before the first of the two bad windows
    assert summary["steps"] == scored[-1] + 1
    same = train(command_line, log, tmp_path / "same", f"train.max_steps={back}")
    assert_equal(same["state_dict"], stopped["state_dict"])
    assert stopped["lineage"]["rows"] == same["lineage"]["rows"]


def test_it_is_off_by_default_and_part_of_no_hash(command_line: Command, log: Path, tmp_path: Path) -> None:
    train(command_line, log, tmp_path / "whole", "train.max_steps=2")
    train(command_line, log, tmp_path / "less", "train.max_steps=2", "~callbacks.early_stop")
    one, other = (finished(tmp_path / name).summary for name in ("whole", "less"))
    assert one["reason"] == ""
    assert one["config_hash"] == other["config_hash"]


@pytest.mark.parametrize("wrong", [{"patience": -1}, {"tolerance": 0.0}, {"min_windows": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"callbacks\.early_stop"):
        EarlyStop(**wrong)
