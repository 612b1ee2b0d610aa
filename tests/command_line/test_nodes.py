"""Two machines, in one: two torchrun agents with one rendezvous, and two tasks of a SLURM job on two nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from nodes_support import agent, children, free_port, recording, started
from ranker import config, trainer
from ranker.errors import UserError
from support import (
    ROOT,
    TINY,
    TWO_RANKS,
    Finished,
    assert_equal,
    finished,
    metrics,
    newest_checkpoint,
    slowness,
    wait_for,
)

LONGER = ("data.log.train_rows=15360", "train.checkpoint_every=7", "train.eval_every=20", "train.log_every=1")
SECONDS = 60  # after a death, where 10 are promised, on an idle machine


@dataclass(frozen=True)
class Ended:
    """What the two machines said, and the status of each."""

    output: str
    errors: str
    status: tuple[int, ...]

    def errors_of_ours(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("error: ")]


def on_two_nodes(
    *overrides: str, options: tuple[str, ...] = (), each: tuple[Mapping[str, str], ...] = ({}, {})
) -> list[subprocess.Popen[str]]:
    """Starts the command on both machines: by torchrun, or as tasks of SLURM where variables are given."""
    if not any(each):
        port = free_port()
        return [agent(port, "--nnodes=2", *options, overrides=overrides) for _ in each]
    return [started(sys.executable, str(ROOT / "train.py"), overrides=overrides, variables=own) for own in each]


def end_of(nodes: list[subprocess.Popen[str]]) -> Ended:
    said = [node.communicate() for node in nodes]
    return Ended(*("".join(texts) for texts in zip(*said, strict=True)), tuple(node.returncode for node in nodes))


def assert_same_end(got: Path, expected: Path) -> None:
    assert metrics(got) == metrics(expected)
    for part in ("global_step", "state_dict", "optimizer_states", "train_auc_by_rank"):
        assert_equal(newest_checkpoint(expected)[part], newest_checkpoint(got)[part], part)


def test_two_nodes_train_as_one_process_and_agree_on_the_run_folder(
    train_tiny: Callable[..., Finished], tmp_path: Path
) -> None:
    settings = ("train.max_steps=10", "train.eval_every=0", "optim=gc", "lr_mult=0.1", "data.strips=4")
    one = train_tiny(tmp_path / "one", *settings)

    ended = end_of(on_two_nodes(*settings, f"hydra.run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}"))

    assert ended.status == (0, 0), ended.errors
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"run folder: {folder}\n" in ended.output
    assert not ended.errors_of_ours()
    two = finished(folder)
    assert (two.summary["world_size"], two.summary["examples"]) == (2, one.summary["examples"])
    for name, value in one.summary["metrics"].items():
        assert two.summary["metrics"][name] == pytest.approx(value, rel=1e-3), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that rank 0 starts, which is how one machine does it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *TWO_RANKS, *LONGER, f"hydra.run.dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.attack
@pytest.mark.parametrize("settings", [(), ("trainer.devices=1", "trainer.num_nodes=2")])
def test_two_nodes_end_with_the_bits_of_two_ranks_of_one_machine(
    undisturbed: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    ended = end_of(on_two_nodes(*LONGER, *settings, f"hydra.run.dir={tmp_path / 'run'}"))
    assert ended.status == (0, 0), ended.errors
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.attack
def test_a_rank_that_dies_on_another_node_ends_the_job_with_one_line(tmp_path: Path) -> None:
    nodes = on_two_nodes(*LONGER, "data.log.train_rows=2000000", f"hydra.run.dir={tmp_path / 'run'}")
    wait_for(lambda: bool(list(tmp_path.glob("run/checkpoints/*.ckpt"))), nodes[0])
    (rank,) = children(nodes[1].pid)
    limit = SECONDS * slowness(rank)
    os.kill(rank, signal.SIGKILL)

    start = time.monotonic()
    ended = end_of(nodes)

    assert time.monotonic() - start < limit
    assert all(ended.status)
    (line,) = ended.errors_of_ours()
    assert re.fullmatch(
        r"error: rank [01]( \(on .+\))? was killed, or its machine failed; go on with: .* "
        rf"resume={re.escape(str(tmp_path / 'run'))}, behind torchrun as before",
        line,
    )


@pytest.mark.attack
def test_torchrun_goes_on_from_the_newest_checkpoint_by_itself(undisturbed: Path, tmp_path: Path) -> None:
    named = f"hydra.run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}"
    recorder = recording(tmp_path / "rows", kill_at=18)

    ended = end_of(on_two_nodes(*LONGER, named, recorder, options=("--max-restarts=2",)))

    assert ended.status == (0, 0), ended.errors
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"run folder: {folder}, goes on after step 14" in ended.output
    assert_same_end(folder, undisturbed)


@pytest.mark.attack
def test_a_signal_to_one_node_saves_the_run(tmp_path: Path) -> None:
    nodes = on_two_nodes(*LONGER, "data.log.train_rows=2000000", f"hydra.run.dir={tmp_path / 'run'}")
    wait_for(lambda: bool(list(tmp_path.glob("run/checkpoints/*.ckpt"))), nodes[0])
    nodes[1].terminate()  # torchrun passes it on

    ended = end_of(nodes)

    assert all(ended.status)
    assert ended.errors.count("go on with: ") == 1
    assert re.search(r"interrupted at step \d+ by SIGTERM; go on with: ", ended.errors)
    assert finished(tmp_path / "run").summary["steps"] == newest_checkpoint(tmp_path / "run")["global_step"]


@pytest.mark.attack
def test_a_slurm_job_on_two_nodes_is_put_back_once_and_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    job = {
        **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"},
        **{"SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"},
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }

    def tasks(**more: str) -> tuple[Mapping[str, str], ...]:
        own = job | {"MASTER_PORT": str(free_port())} | more
        return tuple(own | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2))

    command = (*LONGER, recording(tmp_path / "rows"), f"hydra.run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}")
    nodes = on_two_nodes(*command, each=tasks())
    wait_for(lambda: len((tmp_path / "rows" / "rank0.jsonl").read_text().splitlines()) > 9
             if (tmp_path / "rows" / "rank0.jsonl").exists() else False, nodes[0])  # fmt: skip
    for node in nodes:  # SLURM sends it to all tasks
        node.send_signal(signal.SIGUSR1)
    ended = end_of(nodes)

    assert ended.status == (128 + signal.SIGUSR1,) * 2, ended.errors
    assert (tmp_path / "called").read_text() == "requeue 4711\n"
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/config.yaml"))

    ended = end_of(on_two_nodes(*command, each=tasks(SLURM_RESTART_COUNT="1")))

    assert ended.status == (0, 0), ended.errors
    assert f"run folder: {folder}, goes on after step " in ended.output
    assert_same_end(folder, undisturbed)


@pytest.mark.attack
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("trainer.num_nodes=3",), r"trainer\.num_nodes is 3, but torchrun has started 2 processes on 2 machines"),
        (("trainer.strategy=auto",), "trainer.strategy=auto trains in one; add trainer=ddp"),
        (("lr_mult=often",), "lr_mult"),
        (("-m", "seed=0,1"), "-m is a sweep of many runs"),
        (("data.strips=4", "data.dense_statistics=past_windows"), "needs whole windows"),
    ],
)
def test_a_mistake_is_said_once_on_all_nodes(tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    ended = end_of(on_two_nodes(*overrides, f"hydra.run.dir={tmp_path / 'run'}", f"hydra.sweep.dir={tmp_path / 'all'}"))
    assert all(ended.status)
    (line,) = ended.errors_of_ours()
    assert re.search(said, line)


@pytest.mark.parametrize(("accelerator", "refused"), [("auto", True), ("cpu", False)])
def test_sparse_gradients_between_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, refused: bool
) -> None:
    config.register()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["trainer=ddp", f"trainer.accelerator={accelerator}", "model.net.sparse_embeddings=true"]
        cfg = compose("config", overrides=[*overrides, "trainer.devices=2"])
    with pytest.raises(UserError, match="NCCL cannot exchange sparse") if refused else nullcontext():
        trainer.check_devices(cfg)
