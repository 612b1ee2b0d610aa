"""Sweeps with sweep.vectorize: run folders as ever, jobs done before, reasons to run alone, what was killed."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ranker.commands import train as train_commands
from ranker.paper import jobs as paper_jobs
from ranker.paper.store import find
from ranker.runs.checkpoint_files import step_of
from ranker.sweeps import vectorize
from ranker.vectorized import group
from ranker.vectorized.replica import Job
from support import TINY, Finished, train_process, wait_for
from vectorized_support import QUICK_VERDICT, summary

Command = Callable[..., None]
SHORT = ("train.max_steps=4", "train.eval_every=0", "data.log.train_rows=1024", "data.log.eval_rows=512")


@pytest.fixture
def sweep(command_line: Command, tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """Runs a sweep; returns its run folders by ``optim seed``."""

    def call(*overrides: str) -> dict[str, Path]:
        command_line("-m", *TINY, *SHORT, f"hydra.sweep.dir={tmp_path / 'sweep'}", *overrides)
        folders = {}
        for path in (tmp_path / "sweep").glob("*/summary.json"):
            found = json.loads(path.read_text())
            folders[f"{found['optim']} {found['seed']}"] = path.parent
        return folders

    return call


def vectorized(folder: Path) -> Any:
    found = json.loads((folder / "summary.json").read_text())
    return found.get("vectorized"), found.get("order_seed")


def test_jobs_are_trained_as_one_and_leave_what_they_leave_alone(
    sweep: Callable[..., dict[str, Path]],
    train_tiny: Callable[..., Finished],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = sweep("sweep.vectorize=4", "seed=0,1", "optim=clippy,gc")
    told = capsys.readouterr().out

    assert "jobs 0 to 3: trained as one" in told
    assert told.count("sweep: 4 of 4 jobs done (4 completed)") == 2  # after training, and at the end
    assert "HYDRA" not in told  # nothing is left to launch
    assert {vectorized(folder) for folder in runs.values()} == {(4, 0)}
    alone = train_tiny(tmp_path / "alone", *SHORT, "optim=gc", "seed=0")
    assert summary(runs["gc 0"])["metrics"] == pytest.approx(alone.summary["metrics"], rel=1e-4, nan_ok=True)
    assert summary(runs["gc 0"])["config_hash"] == alone.summary["config_hash"]
    found, missing = find(tmp_path / "sweep", [(*TINY, *SHORT, "optim=gc", "seed=1")])
    assert [run.name for _, (run, _) in found] == [runs["gc 1"].name]
    assert not missing

    capsys.readouterr()
    again = sweep("sweep.vectorize=4", "seed=0,1,2", "optim=clippy,gc")
    told = capsys.readouterr().out

    assert "sweep: 6 of 6 jobs done (2 completed, 4 done before)" in told
    assert vectorized(again["gc 2"]) == (2, 0)


def test_what_a_group_cannot_do_runs_alone_and_the_line_says_why(
    sweep: Callable[..., dict[str, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sweep("sweep.vectorize=2", "seed=0,1", "callbacks.histograms.every=50", "trainer.gradient_clip_val=1.0")

    why = "2 jobs run alone, because of trainer.gradient_clip_val=1.0, callbacks.histograms.every=50"
    assert why in capsys.readouterr().out
    assert {vectorized(folder) for folder in runs.values()} == {(None, None)}


def test_jobs_that_fail_as_one_run_alone(
    sweep: Callable[..., dict[str, Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(group, "train", broken)

    runs = sweep("sweep.vectorize=2", "seed=0,1")

    told = capsys.readouterr().out
    assert "run alone, since they failed as one: RuntimeError: no memory" in told
    assert "sweep: 2 of 2 jobs done (2 completed)" in told
    assert {vectorized(folder) for folder in runs.values()} == {(None, None)}


def test_a_killed_group_without_checkpoints_starts_again_with_what_is_missing(
    sweep: Callable[..., dict[str, Path]],
) -> None:
    words = ("sweep.vectorize=3", "seed=0,1,2", "train.checkpoint_every=0")
    runs = sweep(*words)
    kept = (runs["clippy 0"] / "summary.json").stat().st_mtime_ns
    for seed in (1, 2):  # what a kill leaves: everything but the summary
        (runs[f"clippy {seed}"] / "summary.json").unlink()
    shutil.rmtree(runs["clippy 2"])

    again = sweep(*words)

    assert (again["clippy 0"] / "summary.json").stat().st_mtime_ns == kept
    assert [vectorized(again[f"clippy {seed}"]) for seed in (1, 2)] == [(2, 0), (2, 0)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_killed_while_a_group_trains_ends_as_if_it_had_not_been(
    sweep: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([["optim=adagrad", "lr_mult=200", "seed=7"], ["seed=0"], ["seed=3", "lr_mult=2"]]))
    words = (
        *("sweep.vectorize=3", "hydra/sweeper=list", f"hydra.sweeper.jobs={jobs}"),
        *("train.max_steps=40", "data.log.train_rows=10240", "train.checkpoint_every=4", "train.eval_every=10"),
        *("callbacks.divergence.poll_every=2", *QUICK_VERDICT),
    )
    folders = sweep(*words)
    shutil.move(tmp_path / "sweep", tmp_path / "whole")
    whole = {name: tmp_path / "whole" / path.name for name, path in folders.items()}

    process = train_process("-m", *TINY, *SHORT, f"hydra.sweep.dir={tmp_path / 'sweep'}", *words)
    going = [folders["clippy 0"], folders["clippy 3"]]
    wait_for(lambda: all((x / "checkpoints" / "step=20.ckpt").is_file() for x in going), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ended = (folders["adagrad 7"] / "summary.json").stat().st_mtime_ns
    assert not any((folder / "summary.json").is_file() for folder in going)

    assert sweep(*words) == folders

    assert (folders["adagrad 7"] / "summary.json").stat().st_mtime_ns == ended
    for name, folder in folders.items():
        one, other = summary(folder), summary(whole[name])
        assert one.pop("commit")  # another process may have found another one
        assert one == {key: value for key, value in other.items() if key != "commit"}
        assert (folder / "metrics.csv").read_bytes() == (whole[name] / "metrics.csv").read_bytes()
    assert [vectorized(folder) for folder in going] == [(2, 0), (2, 0)]


@pytest.mark.slow
def test_groups_of_a_parallel_sweep_train_in_processes(
    sweep: Callable[..., dict[str, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    runs = sweep("sweep.vectorize=4", "seed=0,1,2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

    assert {vectorized(folder) for folder in runs.values()} == {(2, 0)}
    assert capfd.readouterr().out.count("trained as one") == 2


@pytest.mark.parametrize("setting", ["sweep.vectorize=0", "sweep.vectorize_order=mine"])
def test_a_wrong_value_is_one_line(
    command_line: Command, tmp_path: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line(*TINY, f"hydra.run.dir={tmp_path / 'run'}", setting)

    assert capsys.readouterr().err.startswith(f"error: {setting.split('=')[0]}")


def test_a_study_leaves_capsules_out_only_where_runs_can_be_trained_as_one() -> None:
    table = ("model=small", *paper_jobs.BARE, "seed=1")

    assert "callbacks.capsules=null" in paper_jobs.groupable(table)
    assert not any(word.startswith("callbacks.capsules.") for word in paper_jobs.groupable(table))
    figure = ("model=small", *paper_jobs.RECORDED, *paper_jobs.WATCHED)
    assert paper_jobs.groupable(figure) == figure
    mended = (*table, "mitigation=rollback")
    assert paper_jobs.groupable(mended) == mended


def test_the_search_for_the_largest_stable_rate_takes_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ("headroom.seeds=2", "headroom.lowest=1", "headroom.highest=1", f"hydra.sweep.dir={tmp_path}")
    monkeypatch.setattr(sys, "argv", ["stability.py", "--vectorize", "4", *TINY, *SHORT, *search])

    train_commands.headroom()

    assert "trained as one" in capsys.readouterr().out
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("*/summary.json")]
    assert [found["vectorized"] for found in summaries] == [2, 2]


def test_groups_are_of_nearly_the_same_size_and_leave_no_worker_idle() -> None:
    from ranker.vectorized.alike import chunks

    assert [len(part) for part in chunks(range(17), 16)] == [8, 9]
    assert chunks([], 4) == []
    assert vectorize.VECTORIZE == "sweep.vectorize"


def test_jobs_go_on_together_from_the_newest_step_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {0: (100, 200), 1: (200, 300), 2: (), 3: (700, 800), 4: (200, 300)}
    monkeypatch.setattr(vectorize, "_checkpoints", lambda job: {n: Path(f"step={n}.ckpt") for n in steps[job.number]})
    monkeypatch.setattr(vectorize, "_order_of", lambda _, job: 5 if job.number == 4 else 0)  # 4 has run alone
    jobs = [Job(number, OmegaConf.create({"force": False, "seed": 5}), Path()) for number in steps]

    levels = vectorize._levels(jobs, 0)

    found = [[(job.number, job.checkpoint and step_of(job.checkpoint)) for job in level] for level in levels]
    assert found == [[(2, None)], [(0, 200), (1, 200)], [(3, 800)]]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("sweep.vectorize=0", "sweep.vectorize must be a whole number of 1 or more, got 0"),
        ("sweep.vectorize_order=mine", "sweep.vectorize_order 'mine' is unknown"),
    ],
)
def test_a_wrong_option_is_one_line_before_the_first_job(
    word: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command_line: Callable[..., None]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line("-m", *TINY, word, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert ended.value.code == 2
    assert f"error: {line}" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/summary.json"))
