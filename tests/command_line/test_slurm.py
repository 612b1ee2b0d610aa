"""A job under SLURM saves its run before the time is up, goes back into the queue, and goes on with the same run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support import ROOT, TINY, Finished, assert_equal, finished, metrics, newest_checkpoint, train_process, wait_for

# What SLURM sets for a job with one task, as srun starts it.
JOB = {
    **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"},
}


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """A program scontrol that notes its arguments; the folder of both."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\n')
    (folder / "scontrol").chmod(0o755)
    return folder


@pytest.mark.attack
@pytest.mark.parametrize("every", [100, 3])
def test_a_job_that_is_put_back_into_the_queue_ends_as_if_it_had_not_been(
    train_tiny: Callable[..., Finished], scontrol: Path, tmp_path: Path, every: int
) -> None:
    settings = (f"train.checkpoint_every={every}", "train.log_every=1", "scale.eval_batch_size=256")
    whole = train_tiny(tmp_path / "whole", *settings)
    slow = f"+callbacks.slow={{_target_:slow_evaluation.SlowEvaluation,stage:validate,seconds:3,folder:'{tmp_path}'}}"
    command = (*TINY, *settings, slow, f"hydra.run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}")
    variables = JOB | {"PATH": f"{scontrol}{os.pathsep}{os.environ['PATH']}"}
    process = train_process(*command, path=ROOT / "tests", variables=variables)
    wait_for((tmp_path / "validate").exists, process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate()

    assert process.returncode == 128 + signal.SIGUSR1, errors
    assert (scontrol / "called").read_text() == "requeue 4711\n"
    assert "SLURM job 4711 is back in the queue; the same command goes on with the run" in errors
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/config.yaml"))
    assert newest_checkpoint(folder)["global_step"] == 8
    assert not list(folder.glob("hpc_ckpt*"))

    process = train_process(*command, path=ROOT / "tests", variables=variables | {"SLURM_RESTART_COUNT": "1"})
    output, errors = process.communicate()

    assert process.returncode == 0, errors
    assert f"run folder: {folder}, goes on after step 8" in output
    assert len(list((tmp_path / "runs").glob("*/config.yaml"))) == 1
    assert finished(folder).summary["metrics"] == whole.summary["metrics"]
    assert metrics(folder) == metrics(whole.folder)
    expected, got = newest_checkpoint(whole.folder), newest_checkpoint(folder)
    for part in ("global_step", "state_dict", "optimizer_states"):
        assert_equal(expected[part], got[part], part)
