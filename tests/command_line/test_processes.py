"""What only whole processes show: kill -9 and resume, an interruption, two DDP processes."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support import (
    ROOT,
    TINY,
    TWO_RANKS,
    Finished,
    assert_equal,
    finished,
    metrics,
    newest_checkpoint,
    train_process,
    wait_for,
)

LONGER = ("data.log.train_rows=15360", "train.checkpoint_every=7", "train.eval_every=0")  # 60 steps of 256


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return newest_checkpoint(folder)["state_dict"]


def assert_same_end(resumed: Finished, whole: Finished) -> None:
    for name in ("status", "metrics", "examples"):
        assert resumed.summary[name] == whole.summary[name], name
    assert metrics(resumed.folder) == metrics(whole.folder)
    expected, got = newest_checkpoint(whole.folder), newest_checkpoint(resumed.folder)
    for part in ("global_step", "state_dict", "optimizer_states", "train_auc_by_rank"):
        assert_equal(expected[part], got[part], part)


def test_a_run_killed_in_the_middle_of_a_window_ends_as_if_it_had_not_been(
    train_tiny: Callable[..., Finished], command_line: Callable[..., None], tmp_path: Path
) -> None:
    whole = train_tiny(tmp_path / "whole", *LONGER, "train.checkpoint_every=60")
    process = train_process(*TINY, *LONGER, f"hydra.run.dir={tmp_path / 'killed'}")
    wait_for(lambda: bool(list((tmp_path / "killed" / "checkpoints").glob("*.ckpt"))), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "summary.json").exists()

    command_line(f"resume={tmp_path / 'killed'}", "train.checkpoint_every=60", f"hydra.run.dir={tmp_path / 'unused'}")

    assert whole.summary["status"] == "completed"
    assert_same_end(finished(tmp_path / "killed"), whole)


def recording(folder: Path, *, kill_at: int | None = None) -> str:
    folder.mkdir(exist_ok=True)
    target = "row_recorder.RowRecorder"
    return f"+callbacks.rows={{_target_:{target},folder:'{folder}',kill_at:{'null' if kill_at is None else kill_at}}}"


TRUSTED = "trust=[row_recorder.RowRecorder]"  # of a resumed run


def rows_seen(folder: Path, rank: int = 0) -> dict[int, list[int]]:
    """By batch, the row ids of the last time it was trained on."""
    lines = map(json.loads, (folder / f"rank{rank}.jsonl").read_text().splitlines())
    return dict(lines)


# The first of a window, where a checkpoint was just written, in the middle; and anywhere.
@pytest.mark.attack
@pytest.mark.parametrize("step", [8, 21, 52, *random.Random(0).sample(range(7, 60), 3)])
def test_the_rows_seen_are_the_same_wherever_a_run_is_killed(
    command_line: Callable[..., None], train_tiny: Callable[..., Finished], tmp_path: Path, step: int
) -> None:
    settings = (*LONGER, "data.num_workers=2")
    whole = train_tiny(tmp_path / "whole", *settings, recording(tmp_path / "rows"))
    killed = recording(tmp_path / "rows_killed", kill_at=step)
    process = train_process(*TINY, *settings, killed, f"hydra.run.dir={tmp_path / 'killed'}", path=ROOT / "tests")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = rows_seen(tmp_path / "rows_killed")
    assert sorted(before) == list(range(step))

    (tmp_path / "rows_killed" / "rank0.jsonl").unlink()
    command_line(f"resume={tmp_path / 'killed'}", TRUSTED, f"hydra.run.dir={tmp_path / 'unused'}")

    after, everything = rows_seen(tmp_path / "rows_killed"), rows_seen(tmp_path / "rows")
    first = min(after)
    assert first == step // 7 * 7, "goes on with the batch after the newest checkpoint"
    assert {number: before[number] for number in range(first)} | after == everything
    assert sorted(row for rows in everything.values() for row in rows) == list(range(15360))
    assert finished(tmp_path / "killed").summary["metrics"] == whole.summary["metrics"]
    expected, got = newest_checkpoint(whole.folder), newest_checkpoint(tmp_path / "killed")
    for part in ("state_dict", "optimizer_states"):
        assert_equal(expected[part], got[part], part)


@pytest.mark.attack
def test_two_ranks_killed_in_the_middle_of_a_window_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    settings = (*TINY, *LONGER, *TWO_RANKS, "data.num_workers=2", "data.dense_statistics=past_windows")
    settings = (*settings, "train.log_every=1")
    whole_rows, killed_rows = tmp_path / "rows", tmp_path / "rows_killed"
    process = train_process(
        *settings,
        recording(whole_rows),
        "train.checkpoint_every=60",
        f"hydra.run.dir={tmp_path / 'whole'}",
        path=ROOT / "tests",
    )
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    process = train_process(
        *settings,
        recording(killed_rows),
        f"hydra.run.dir={tmp_path / 'killed'}",
        start_new_session=True,
        path=ROOT / "tests",
    )
    wait_for(lambda: bool(list((tmp_path / "killed" / "checkpoints").glob("*.ckpt"))), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "summary.json").exists()
    step = newest_checkpoint(tmp_path / "killed")["global_step"]
    assert 0 < step < 60
    assert step % 8, "a window has 8 batches: this is no place in the middle of one"

    before = [rows_seen(killed_rows, rank) for rank in range(2)]
    for rank in range(2):
        (killed_rows / f"rank{rank}.jsonl").unlink()

    process = train_process(f"resume={tmp_path / 'killed'}", TRUSTED, "train.checkpoint_every=60", path=ROOT / "tests")
    _, errors = process.communicate()
    assert process.returncode == 0, errors

    for rank in range(2):
        after = rows_seen(killed_rows, rank)
        assert min(after) == step
        assert {number: before[rank][number] for number in range(step)} | after == rows_seen(whole_rows, rank)
    everything = [row for rank in range(2) for rows in rows_seen(whole_rows, rank).values() for row in rows]
    assert sorted(everything) == list(range(15360))

    whole, resumed = finished(tmp_path / "whole"), finished(tmp_path / "killed")
    assert resumed.summary["world_size"] == 2
    assert_same_end(resumed, whole)
    by_rank = newest_checkpoint(whole.folder)["train_auc_by_rank"]
    assert not torch.equal(by_rank[0], by_rank[1])


def test_ctrl_c_leaves_a_checkpoint_and_a_summary(tmp_path: Path) -> None:
    process = train_process(
        *TINY, *LONGER, "train.checkpoint_every=0", "data.log.train_rows=2000000", f"hydra.run.dir={tmp_path}"
    )
    table = tmp_path / "metrics.csv"
    wait_for(lambda: table.exists() and "\n10," in table.read_text(), process)
    process.send_signal(signal.SIGINT)
    process.communicate()

    assert process.returncode == 1
    assert finished(tmp_path).summary["status"] == "failed"
    assert "interrupted" in finished(tmp_path).summary["reason"]
    assert list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_two_ddp_processes_train_as_one_on_the_joined_batches(
    train_tiny: Callable[..., Finished], tmp_path: Path
) -> None:
    settings = ("train.max_steps=20", "optim=gc", "lr_mult=0.1", "callbacks.early_signs.every=10")
    settings = (*settings, "callbacks.early_signs.task_gradients=1", "callbacks.sharpness.every=10")
    one = train_tiny(tmp_path / "one", *settings)
    process = train_process(*TINY, *settings, *TWO_RANKS, f"hydra.run.dir={tmp_path / 'two'}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors

    two = finished(tmp_path / "two")
    assert two.summary["world_size"] == 2
    assert two.summary["examples"] == one.summary["examples"]
    for name, value in one.summary["metrics"].items():
        assert two.summary["metrics"][name] == pytest.approx(value, rel=1e-3), name
    alone, joined = ({int(row["step"]): row for row in metrics(run.folder)}[10] for run in (one, two))
    signs = [name for name in alone if name.startswith(("signs/", "sigma/"))]
    assert float(joined["sharpness/preconditioned"]) > 0, "at the rows of the first rank alone"
    assert {"signs/bottom_top/dead_relus", "signs/bottom_first/activation_max", "signs/task_norm/like"} <= set(signs)
    for name in signs:
        assert float(joined[name]) == pytest.approx(float(alone[name]), rel=1e-2, abs=1e-4), name


@pytest.mark.slow
def test_the_global_clip_of_two_processes_is_that_of_one(train_tiny: Callable[..., Finished], tmp_path: Path) -> None:
    settings = ("train.max_steps=20", "mitigation=global_clip", "trainer.gradient_clip_val=0.05", "optim=adagrad")
    settings = (*settings, "lr_mult=0.1", "train.eval_every=0", "train.checkpoint_every=20")
    one = train_tiny(tmp_path / "one", *settings)
    loose = train_tiny(tmp_path / "loose", *settings, "trainer.gradient_clip_val=1e9")
    process = train_process(*TINY, *settings, *TWO_RANKS, f"hydra.run.dir={tmp_path / 'two'}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors

    alone, joined, unclipped = (weights(run) for run in (one.folder, tmp_path / "two", loose.folder))
    names = [name for name in alone if alone[name].is_floating_point() and name.startswith("net.")]
    assert names
    assert all(torch.allclose(alone[name], joined[name], rtol=1e-3, atol=1e-4) for name in names)
    assert any(not torch.allclose(alone[name], unclipped[name], rtol=1e-3, atol=1e-4) for name in names)


@pytest.mark.slow
def test_a_multirun_of_ddp_jobs_runs_each_job_once_and_leaves_no_other_folder(tmp_path: Path) -> None:
    before = set((ROOT / "runs").glob("*"))
    process = train_process(
        "-m",
        *TINY,
        "seed=0,1",
        "train.max_steps=4",
        "train.eval_every=0",
        *TWO_RANKS,
        f"hydra.sweep.dir={tmp_path}",
    )
    _, errors = process.communicate()

    assert process.returncode == 0, errors
    assert [finished(p.parent).summary["world_size"] for p in sorted(tmp_path.glob("*/summary.json"))] == [2, 2]
    assert set((ROOT / "runs").glob("*")) == before
