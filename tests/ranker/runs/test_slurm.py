"""Which run a job goes on with, and what is said where it cannot be put back into the queue."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ranker.runs import run_lock, slurm
from ranker.runs.config_identity import config_hash

CFG = OmegaConf.create({"seed": 0})


def run(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create({"seed": seed}), folder / "config.yaml")
    with run_lock.held(folder):
        pass
    return folder


@pytest.fixture(autouse=True)
def _job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "47")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


def test_a_requeued_job_finds_its_run_beside_the_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, new = config_hash(CFG), tmp_path / "new"
    own, _ = run(tmp_path / "old"), run(tmp_path / "other_seed", seed=1)
    monkeypatch.setenv("SLURM_JOB_ID", "471")
    run(tmp_path / "other_job")
    monkeypatch.setenv("SLURM_JOB_ID", "47")

    assert slurm.earlier_attempt(new, mark) == own
    assert slurm.earlier_attempt(own, mark) == own
    assert slurm.earlier_attempt(new, "another") is None


@pytest.mark.parametrize(("name", "value"), [("SLURM_RESTART_COUNT", "0"), ("SLURM_JOB_NAME", "bash")])
def test_no_run_is_gone_on_with_in_the_first_attempt_or_interactively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    own = run(tmp_path / "old")
    monkeypatch.setenv(name, value)

    assert slurm.earlier_attempt(own, config_hash(CFG)) is None


def test_a_task_of_an_array_is_a_job_of_its_own() -> None:
    array = {"SLURM_JOB_ID": "90", "SLURM_ARRAY_JOB_ID": "88", "SLURM_ARRAY_TASK_ID": "2"}

    assert run_lock.job_of(array) == "88_2"
    assert run_lock.job_of({}) is None


def test_a_refusal_of_scontrol_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "SLURM job 47 was not put back into the queue: " in slurm.requeue("47")

    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Job is not\nrequeueable' >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert slurm.requeue("47") == "SLURM job 47 was not put back into the queue: Job is not requeueable"
