"""Sweeps that finish: what is done is not done again, a failure ends nobody else, an explicit list of jobs."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import TINY, train_process, wait_for

Command = Callable[..., None]
SHORT = (*TINY, "train.max_steps=2", "train.eval_every=0", "data.log.train_rows=1024", "data.log.eval_rows=512")


def sweep(command_line: Command, folder: Path, *overrides: str) -> None:
    command_line("-m", *SHORT, f"hydra.sweep.dir={folder}", *overrides)


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/summary.json")}


def written(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}


def test_a_sweep_started_again_with_more_jobs_in_another_order_does_only_what_is_missing(
    command_line: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(command_line, tmp_path, "seed=0,1")
    before = written(tmp_path)
    capsys.readouterr()

    sweep(command_line, tmp_path, "seed=2,1,0", "tags=[again]", "train.threads=0")

    after, told = written(tmp_path), capsys.readouterr().out
    assert len(before) == 2
    assert len(after) == 3
    assert {name: after[name] for name in before} == before
    assert told.count("done before, completed") == 2
    assert "sweep: 3 of 3 jobs done (1 completed, 2 done before)" in told
    hashes = [summary["config_hash"] for summary in summaries(tmp_path).values()]
    assert len(set(hashes)) == 3


def test_force_does_a_finished_job_again_and_leaves_one_summary(command_line: Command, tmp_path: Path) -> None:
    sweep(command_line, tmp_path, "seed=0")
    before = written(tmp_path)

    sweep(command_line, tmp_path, "seed=0", "force=true")

    assert written(tmp_path).keys() == before.keys()
    assert written(tmp_path) != before


def test_a_failed_job_ends_no_other_is_listed_and_is_done_again(
    command_line: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, batch: object, batch_idx: int) -> None:
        raise RuntimeError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("ranker.training.module.RankingModule.training_step", broken)
        with pytest.raises(SystemExit) as exit_status:
            sweep(command_line, tmp_path, "seed=0,1")
    assert exit_status.value.code == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert all("RuntimeError: the disk is gone" in line for line in failed)
    assert all("RuntimeError" in path.read_text() for path in tmp_path.glob("*/traceback.txt"))

    sweep(command_line, tmp_path, "seed=0,1")

    assert [s["status"] for s in summaries(tmp_path).values()] == ["completed"] * 2
    assert not list(tmp_path.glob("*/traceback.txt"))


def test_a_job_with_a_wrong_value_fails_alone_and_has_a_summary(
    command_line: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep(command_line, tmp_path, "lr_mult=-1,1")

    statuses = {summary["lr_mult"]: summary["status"] for summary in summaries(tmp_path).values()}
    assert statuses == {-1: "failed", 1: "completed"}
    told = capsys.readouterr()
    assert "lr_mult must be a number above 0, got -1.0" in told.err
    assert "2 of 2 jobs done (1 completed, 1 failed)" in told.out


@pytest.mark.parametrize("checkpoint", ["none", "truncated"])
def test_a_run_killed_without_a_usable_checkpoint_is_done_again_in_a_clean_folder(
    command_line: Command, tmp_path: Path, checkpoint: str
) -> None:
    sweep(command_line, tmp_path, "seed=0", "train.checkpoint_every=0")
    (folder,) = (path.parent for path in tmp_path.glob("*/summary.json"))
    (folder / "summary.json").unlink()  # what a kill leaves: everything but the summary
    (folder / "events.jsonl").write_text('{"kind": "full", "step": 1}\n')
    if checkpoint == "truncated":
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "step=1.ckpt").write_bytes(b"PK")

    sweep(command_line, tmp_path, "seed=0")

    assert summaries(tmp_path)[folder.name]["status"] == "completed"
    assert not (folder / "events.jsonl").exists()


def test_a_run_that_was_killed_goes_on_from_its_checkpoint_unless_forced(
    command_line: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ("seed=0", "train.max_steps=4", "train.checkpoint_every=2")
    sweep(command_line, tmp_path, *every)
    (folder,) = (path.parent for path in tmp_path.glob("*/summary.json"))
    whole = summaries(tmp_path)[folder.name]["metrics"]

    (folder / "summary.json").unlink()
    capsys.readouterr()
    sweep(command_line, tmp_path, *every)
    assert "resuming from" in capsys.readouterr().out
    assert summaries(tmp_path)[folder.name]["metrics"] == whole

    (folder / "summary.json").unlink()
    sweep(command_line, tmp_path, *every, "force=true")
    assert "resuming from" not in capsys.readouterr().out
    assert summaries(tmp_path)[folder.name]["metrics"] == whole


def test_another_run_is_never_overwritten(
    command_line: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(command_line, tmp_path, "seed=0", "hydra.sweep.subdir=here")
    before = written(tmp_path)

    with pytest.raises(SystemExit):
        sweep(command_line, tmp_path, "seed=1", "hydra.sweep.subdir=here")

    assert written(tmp_path) == before
    assert "here holds another run" in capsys.readouterr().err


def test_a_list_of_jobs_is_launched_with_what_the_command_line_adds_to_all(
    command_line: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.yaml").write_text("- [optim=gc, seed=3]\n- [lr_mult=0.5]\n- [optim=gc, seed=3]\n")

    sweep(
        command_line, tmp_path / "out", "hydra/sweeper=list", f"hydra.sweeper.jobs={tmp_path / 'jobs.yaml'}", "seed=7"
    )

    found = {(s["optim"], s["seed"], s["lr_mult"]) for s in summaries(tmp_path / "out").values()}
    assert found == {("gc", 3, 1.0), ("clippy", 7, 0.5)}
    assert "sweep: 2 of 2 jobs done" in capsys.readouterr().out


def test_a_missing_list_of_jobs_is_said_in_one_line(
    command_line: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        sweep(command_line, tmp_path, "hydra/sweeper=list", "hydra.sweeper.jobs=nowhere.yaml")

    assert exit_status.value.code == 2
    assert "error: hydra.sweeper.jobs: no file nowhere.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_side_by_side_share_the_cores_and_keep_their_words_apart(
    command_line: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = [["seed=0"], ["seed=1"], ["lr_mult=-1"]]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    parallel = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.callbacks.sweep.line_seconds=0")

    with pytest.raises(SystemExit):
        sweep(
            command_line,
            tmp_path / "out",
            *parallel,
            "hydra/sweeper=list",
            f"hydra.sweeper.jobs={tmp_path / 'jobs.json'}",
        )

    told = capfd.readouterr()
    assert sorted(s["status"] for s in summaries(tmp_path / "out").values()) == ["completed", "completed", "failed"]
    assert "sweep: 3 of 3 jobs done (2 completed, 1 failed)" in told.out
    assert "hold-out" not in told.out
    assert all("hold-out" in path.read_text() for path in (tmp_path / "out").glob("*/output.txt"))
    assert "lr_mult must be a number above 0" in told.err


@pytest.mark.attack
def test_a_killed_sweep_goes_on_with_what_is_missing(command_line: Command, tmp_path: Path) -> None:
    long = ("seed=0,1", "data.log.train_rows=51200", "train.max_steps=200")
    process = train_process("-m", *TINY, "train.eval_every=0", *long, f"hydra.sweep.dir={tmp_path}")
    wait_for(lambda: len(list(tmp_path.glob("*/metrics.csv"))) > 1, process)  # the second job has begun
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = written(tmp_path)
    assert len(before) == 1

    command_line("-m", *TINY, "train.eval_every=0", *long, f"hydra.sweep.dir={tmp_path}")

    after = written(tmp_path)
    assert len(after) == 2
    assert {name: after[name] for name in before} == before
