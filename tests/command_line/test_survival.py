"""Rollback where things really go wrong: a log with broken rows, kill -9, two ranks, accumulated gradients."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from broken_log import BAD, BAD_ROWS, BATCH, BATCHES, RING, ROLLBACK, SETTINGS, write_log
from rows_seen import OVERRIDE
from support import ROOT, TWO_RANKS, Finished, assert_equal, finished, metrics, train_process, wait_for

Train = Callable[..., Finished]

STEPS = 200
TRUSTED = "trust=[rows_seen.RowsSeen]"  # of a resumed run
CUT = (f"train.max_steps={STEPS}", "train.log_every=1", "callbacks.rollback.lr_factor=0.5")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that train on a log in which one window blows the model up."""
    return (*SETTINGS, f"data.root={write_log(tmp_path_factory.mktemp('broken') / 'log')}")


@pytest.fixture(scope="module")
def train(command_line: Callable[..., None]) -> Train:
    def call(folder: Path, *overrides: str) -> Finished:
        command_line(f"hydra.run.dir={folder}", *overrides)
        return finished(folder)

    return call


@pytest.fixture
def resume(command_line: Callable[..., None], tmp_path: Path) -> Callable[[Path], None]:
    def call(folder: Path) -> None:
        unused = f"hydra.run.dir={tmp_path / 'unused'}"
        command_line(f"resume={folder}", TRUSTED, f"train.checkpoint_every={STEPS}", unused)

    return call


def checkpoint(folder: Path) -> dict[str, Any]:
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    return torch.load(newest, weights_only=True)


def checkpoint_step(folder: Path) -> int:
    return max((int(p.stem.removeprefix("step=")) for p in (folder / "checkpoints").glob("*.ckpt")), default=0)


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def kill_after_rollback(folder: Path, *overrides: str, wait_for_checkpoint: bool) -> int:
    """Starts train.py and kills all its processes after the rollback; the step of the checkpoint that it leaves."""
    process = train_process(*overrides, f"hydra.run.dir={folder}", start_new_session=True)

    def due() -> bool:
        gone_back = [e["step"] for e in events(folder) if e["kind"] == "rollback"]
        return bool(gone_back) and (not wait_for_checkpoint or checkpoint_step(folder) > gone_back[0])

    wait_for(due, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "summary.json").exists()
    return checkpoint_step(folder)


def assert_same_end(resumed: Finished, whole: Finished) -> None:
    for name in ("status", "metrics", "rollbacks", "divergence", "steps", "examples"):
        assert resumed.summary[name] == whole.summary[name], name
    for name in ("events.jsonl", "skipped_rows.csv"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert metrics(resumed.folder) == metrics(whole.folder)
    expected, got = checkpoint(whole.folder), checkpoint(resumed.folder)
    assert expected["global_step"] == got["global_step"] == whole.summary["steps"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(expected[part], got[part], part)


@pytest.fixture(scope="module")
def whole(train: Train, broken: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run that nobody kills: it goes back once, and learns."""
    folder = tmp_path_factory.mktemp("whole")
    run = train(folder, *broken, *RING, *ROLLBACK, *CUT, f"train.checkpoint_every={STEPS}")
    (rollback,) = run.summary["rollbacks"]
    assert (rollback["event_step"], rollback["step"], rollback["to_step"]) == (61, 80, 55)
    assert run.summary["status"] == "completed"
    assert run.summary["metrics"]["test/click/auc"] > 0.7
    return run


# Every 10 steps: a checkpoint from after the rollback. Every 47: the newest is of step 47 (or, where the kill comes
# late, 94), so that the resumed run has the divergence before it and must go back by itself.
@pytest.mark.parametrize(
    "every", [pytest.param(10, marks=pytest.mark.slow), pytest.param(47, marks=pytest.mark.attack)]
)
def test_a_run_killed_after_a_rollback_ends_as_if_it_had_not_been(
    broken: tuple[str, ...], whole: Finished, resume: Callable[[Path], None], tmp_path: Path, every: int
) -> None:
    settings = (*broken, *RING, *ROLLBACK, *CUT, f"train.checkpoint_every={every}")
    step = kill_after_rollback(tmp_path / "killed", *settings, wait_for_checkpoint=every == 10)
    assert step < STEPS

    resume(tmp_path / "killed")

    assert_same_end(finished(tmp_path / "killed"), whole)


def seen_by(folder: Path, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"seen_rank{rank}.pt", weights_only=True)


def kept(seen: dict[str, Any]) -> list[tuple[int, int, list[int]]]:
    """The batches whose steps no rollback has undone."""
    undone = [range(r["to_step"] + 1, r["step"] + 1) for r in seen["rollbacks"]]
    return [batch for batch in seen["batches"] if not any(batch[0] in steps for steps in undone)]


def skipped_rows(folder: Path) -> set[int]:
    ranges = [line.split(",")[1:] for line in (folder / "skipped_rows.csv").read_text().splitlines()[1:]]
    return {row for start, stop in ranges for row in range(int(start), int(stop))}


@pytest.mark.attack
def test_two_ranks_go_back_together_lose_no_other_row_and_can_be_killed(
    broken: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}")

    def run(folder: Path, *overrides: str) -> Finished:
        process = train_process(*overrides)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        return finished(folder)

    end = BATCHES - 20 + 25  # steps: 20 batches left out, 25 steps taken twice
    # Another optimizer takes over, and the rate rises back: both must be the same on the ranks, and after a kill.
    way = ("optim@callbacks.rollback.optim=gc", "callbacks.rollback.lr_factor=0.5", "callbacks.rollback.lr_steps=60")
    settings = (*broken, *TWO_RANKS, *RING, *way, "train.log_every=1", OVERRIDE)
    lost = run(tmp_path / "lost", *settings, f"hydra.run.dir={tmp_path / 'lost'}")
    last = f"train.checkpoint_every={end}"
    saved = run(tmp_path / "saved", *settings, *ROLLBACK, last, f"hydra.run.dir={tmp_path / 'saved'}")

    assert (lost.summary["status"], saved.summary["status"]) == ("diverged", "completed")
    assert saved.summary["world_size"] == 2
    assert saved.summary["metrics"]["test/click/auc"] > 0.7
    first, second = seen_by(saved.folder, 0), seen_by(saved.folder, 1)
    assert first["rollbacks"] == second["rollbacks"] == saved.summary["rollbacks"]
    (rollback,) = first["rollbacks"]
    assert rollback["skipped_batches"] == [55, 75]
    for name, weight in first["weights"].items():
        if not name.startswith("train_auc."):  # of its own rows
            assert torch.equal(weight, second["weights"][name]), name
    rows = [row for seen in (first, second) for _, _, part in kept(seen) for row in part]
    skipped = skipped_rows(saved.folder)
    assert set(range(*BAD_ROWS)) <= skipped
    assert len(skipped) == rollback["skipped_rows"] == 20 * BATCH
    assert sorted(rows) == sorted(set(range(BATCHES * BATCH)) - skipped), "each row once, but for those left out"

    every = "train.checkpoint_every=10"
    step = kill_after_rollback(tmp_path / "killed", *settings, *ROLLBACK, every, wait_for_checkpoint=True)
    assert step < end
    assert_same_end(run(tmp_path / "killed", f"resume={tmp_path / 'killed'}", TRUSTED, last), saved)


def test_under_gradient_accumulation_a_rollback_leaves_every_step_its_batches(
    train: Train, broken: tuple[str, ...], tmp_path: Path
) -> None:
    accumulate = 3
    settings = (*broken, *RING, *ROLLBACK, f"trainer.accumulate_grad_batches={accumulate}", OVERRIDE)
    run = train(tmp_path, *settings, "callbacks.snapshots.every=2", "callbacks.divergence.poll_every=1")

    assert run.summary["status"] == "completed"
    (rollback,) = run.summary["rollbacks"]
    assert rollback["event_step"] == BAD[0] // accumulate + 1
    assert rollback["to_step"] <= rollback["event_step"] - 5
    assert rollback["skipped_batches"][0] == rollback["to_step"] * accumulate
    assert set(range(*BAD_ROWS)) <= skipped_rows(tmp_path)
    steps: dict[int, list[int]] = {}
    for step, number, _ in kept(seen_by(tmp_path, 0)):
        steps.setdefault(step, []).append(number)
    *full, last = [steps[step] for step in sorted(steps)]
    assert all(len(numbers) == accumulate for numbers in full), [n for n in full if len(n) != accumulate]
    left_out = range(*rollback["skipped_batches"])
    assert [n for numbers in [*full, last] for n in numbers] == [n for n in range(BATCHES) if n not in left_out]


def test_a_jump_that_comes_back_is_undone_only_if_asked(train: Train, tmp_path: Path) -> None:
    settings = (*SETTINGS, f"data.root={write_log(tmp_path / 'log', scale=30.0)}", *RING, *ROLLBACK)

    left = train(tmp_path / "left", *settings)
    undone = train(tmp_path / "undone", *settings, "callbacks.rollback.cause=micro")

    assert [e["kind"] for e in events(left.folder)] == ["micro"]
    rows = {int(row["step"]): row for row in metrics(left.folder)}
    assert float(rows[BAD[0] + 1]["train/loss"]) > 3 * float(rows[60]["train/loss"]), "though log_every passes it over"
    assert left.summary["rollbacks"] == []
    assert [e["kind"] for e in events(undone.folder)] == ["micro", "rollback"]
    (rollback,) = undone.summary["rollbacks"]
    assert rollback["cause"] == "micro"
    assert rollback["event_step"] == events(left.folder)[0]["step"] == BAD[0] + 1
    assert set(range(*BAD_ROWS)) <= skipped_rows(undone.folder)
    assert (left.summary["divergence"]["micro"], undone.summary["divergence"]["micro"]) == (1, 0)
    assert undone.summary["status"] == "completed"


def test_after_the_last_try_the_run_ends_as_diverged_and_says_so(
    train: Train, broken: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("callbacks.rollback.skip_batches=0", "callbacks.rollback.lr_factor=0.5")

    run = train(tmp_path, *broken, *RING, *ROLLBACK, *again)  # exit status 0: a lost model is no failure

    assert run.summary["status"] == "diverged"
    assert "2 rollbacks before it did not help" in run.summary["reason"]
    first, second = run.summary["rollbacks"]
    assert [r["try"] for r in (first, second)] == [1, 2]
    assert [r["lr"] for r in (first, second)] == pytest.approx([0.5 * run.summary["lr"], 0.25 * run.summary["lr"]])
    assert [e["kind"] for e in events(tmp_path)] == ["full", "rollback"] * 2 + ["full"]
    assert skipped_rows(tmp_path) == set()
    said = capsys.readouterr().out
    assert "rollback 2 of 2" in said
    assert "no rollback: 2 of 2 made" in said
