"""Rollback as a user gets it: a run that dies of bad rows ends and learns, and resumes exactly."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ranker.data.synthetic import SyntheticLog
from ranker.runs.checkpoint_files import by_step, step_of
from support import CALM, Finished, finished, metrics

Train = Callable[..., Finished]

BATCHES, BAD = 240, (60 * 256, 62 * 256)  # rows of the log whose dense features are infinite
SETTINGS = (
    *CALM,  # every event is one that a test put in
    f"data.log.train_rows={BATCHES * 256}",
    "data.log.rows_per_day=32768",
    "data.log.eval_rows=8192",
    "data.window=256",  # rows in time order: the bad ones are batches 60 and 61
    "train.eval_every=0",
    "train.progressive=false",
    "train.checkpoint_every=0",
    "lr_mult=0.2",
    "callbacks.early_signs.every=0",
)
ROLLBACK = ("callbacks.rollback.tries=2", "callbacks.rollback.back_steps=5", "callbacks.rollback.skip_batches=10")
RING = ("callbacks.snapshots.every=5", "callbacks.snapshots.disk=6")


@pytest.fixture
def bad_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a broken join upstream does: two batches' worth of features that are not finite."""
    read = SyntheticLog.read

    def broken(self: SyntheticLog, start: int, stop: int):
        rows = read(self, start, stop)
        bad = (rows.row_B >= BAD[0]) & (rows.row_B < BAD[1])
        return dataclasses.replace(rows, dense_BF=torch.where(bad[:, None], torch.inf, rows.dense_BF))

    monkeypatch.setattr(SyntheticLog, "read", broken)


def test_a_run_that_dies_without_rollback_ends_with_it_and_has_learned(
    train_tiny: Train, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = train_tiny(tmp_path / "whole", *SETTINGS)
    request.getfixturevalue("bad_rows")
    lost = train_tiny(tmp_path / "lost", *SETTINGS)
    saved = train_tiny(tmp_path / "saved", *SETTINGS, *ROLLBACK, *RING)

    assert (whole.summary["status"], lost.summary["status"]) == ("completed", "diverged")
    assert saved.summary["status"] == "completed"
    auc = "test/click/auc"
    assert whole.summary["metrics"][auc] > 0.6
    assert saved.summary["metrics"][auc] > 0.6

    (rollback,) = saved.summary["rollbacks"]
    assert rollback["event_step"] == 61
    assert rollback["to_step"] <= 56
    assert rollback["skipped_batches"] == [rollback["to_step"], 65]  # ten from 5 before batch 60 on
    assert lost.summary["rollbacks"] == []
    events = [json.loads(line) for line in (saved.folder / "events.jsonl").read_text().splitlines()]
    assert [e["kind"] for e in events] == ["full", "rollback"]
    with (saved.folder / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(set(steps))
    undone = rollback["step"] - rollback["to_step"]
    assert saved.summary["steps"] == BATCHES - (65 - rollback["to_step"]) + undone
    listed = np.loadtxt(saved.folder / "skipped_rows.csv", delimiter=",", skiprows=1, ndmin=2, dtype=int)
    assert listed.tolist() == [[1, rollback["to_step"] * 256, 65 * 256]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_saved_run_ends_as_good_as_one_that_was_never_disturbed(
    train_tiny: Train, tmp_path: Path, request: pytest.FixtureRequest, seed: int
) -> None:
    # Long enough that what a model ends as does not hang on which ten batches it has not seen, on a stream that stands
    # still, and a hold-out of which an AUC is known to 0.003: a difference of 0.005 is then one of the rollback.
    settings = (
        *SETTINGS,
        f"seed={seed}",
        f"data.log.train_rows={1600 * 256}",
        "data.log.eval_rows=65536",
        "data.log.rows_per_day=65536",
        "data.log.difficulty.drift=0",
        "data.log.difficulty.jump=0",
        "data.log.difficulty.arrivals=0",
    )
    whole = train_tiny(tmp_path / "whole", *settings)
    request.getfixturevalue("bad_rows")
    saved = train_tiny(tmp_path / "saved", *settings, *ROLLBACK, *RING)

    assert len(saved.summary["rollbacks"]) == 1
    auc = "test/click/auc"
    assert whole.summary["metrics"][auc] > 0.65
    assert abs(saved.summary["metrics"][auc] - whole.summary["metrics"][auc]) <= 0.005, (
        saved.summary["metrics"],
        whole.summary["metrics"],
    )


def test_the_budget_of_tries_ends_in_a_diverged_run(train_tiny: Train, tmp_path: Path, bad_rows: None) -> None:
    spent = ("callbacks.rollback.tries=1", "callbacks.rollback.back_steps=10", "callbacks.rollback.skip_batches=0")

    run = train_tiny(tmp_path, *SETTINGS, *RING, *spent, "callbacks.rollback.lr_factor=0.5")

    assert run.summary["status"] == "diverged"
    assert "1 rollback before" in run.summary["reason"]
    (rollback,) = run.summary["rollbacks"]
    assert rollback["skipped_rows"] == 0
    assert rollback["lr"] == pytest.approx(0.5 * run.summary["lr"])
    assert run.summary["divergence"]["first_step"] > rollback["step"], "the same rows again"


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [(), ("optim@callbacks.rollback.optim=gc", "callbacks.rollback.lr_steps=100")],
    ids=["same", "other optimizer"],
)
def test_a_run_interrupted_after_a_rollback_goes_on_as_if_it_had_not_been(
    train_tiny: Train, command_line: Callable[..., None], tmp_path: Path, bad_rows: None, way: tuple[str, ...]
) -> None:
    settings = (*SETTINGS, *RING, *ROLLBACK, *way, "callbacks.rollback.lr_factor=0.5", "train.warmup_steps=150")
    whole = train_tiny(tmp_path / "whole", *settings)
    first = train_tiny(tmp_path / "cut", *settings, "train.checkpoint_every=130", "train.max_steps=137")
    (first.folder / "summary.json").unlink()
    (first.folder / "checkpoints" / "step=137.ckpt").unlink(missing_ok=True)

    command_line(f"resume={tmp_path / 'cut'}", "train.max_steps=-1", f"hydra.run.dir={tmp_path / 'unused'}")

    resumed = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert 61 < resumed["rollbacks"][0]["step"] < 130
    for name in ("status", "metrics", "rollbacks", "steps", "examples"):
        assert resumed[name] == whole.summary[name], name
    for name in ("events.jsonl", "skipped_rows.csv"):
        assert (tmp_path / "cut" / name).read_text() == (whole.folder / name).read_text()


def test_a_lost_run_is_resumed_from_before_its_divergence_or_refused(
    train_tiny: Train,
    command_line: Callable[..., None],
    tmp_path: Path,
    bad_rows: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = {}
    for every in (15, 70):
        lost = train_tiny(tmp_path / str(every), *SETTINGS, f"train.checkpoint_every={every}")
        assert lost.summary["status"] == "diverged"
        kept[every] = [step_of(path) for path in by_step(lost.folder / "checkpoints")]
    assert kept == {15: [60, 75, 80], 70: [70, 80]}, "the newest two, and the newest healthy one"

    with pytest.raises(SystemExit):
        command_line(f"resume={tmp_path / '70'}")
    assert "diverged at step 61, and no checkpoint from before that is kept" in capsys.readouterr().err
    assert finished(tmp_path / "70") == lost
    command_line(f"resume={tmp_path / '70'}", "callbacks.divergence.stop=false", "train.max_steps=85")
    assert "diverged at step 61; going on from step 80 with the lost weights" in capsys.readouterr().out
    assert (finished(tmp_path / "70").summary["steps"], finished(tmp_path / "70").summary["status"]) == (85, "diverged")

    command_line(f"resume={tmp_path / '15'}", *ROLLBACK, "train.max_steps=140")
    output = capsys.readouterr().out
    assert "diverged at step 61; going back to step 60, the last checkpoint before that" in output
    resumed = finished(tmp_path / "15")
    assert (resumed.summary["status"], resumed.summary["steps"]) == ("completed", 140)
    assert resumed.summary["rollbacks"][0]["event_step"] == 61
    steps = [int(row["step"]) for row in metrics(tmp_path / "15")]
    assert steps == sorted(set(steps))

    command_line(f"resume={tmp_path / '15'}", "train.max_steps=150")
    assert "diverged at" not in capsys.readouterr().out
