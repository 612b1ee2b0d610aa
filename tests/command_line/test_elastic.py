"""The number of machines changes while a run trains: ``torchrun --nnodes=1:2``, where an agent stands for a machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from nodes_support import agent, children, free_port, recording
from ranker import config, trainer
from ranker.errors import UserError
from support import ROOT, Finished, finished, metrics, newest_checkpoint, wait_for

SETTINGS = ("data.log.train_rows=15360", "train.checkpoint_every=7", "train.eval_every=20", "train.log_every=1")
SETTINGS += ("lr_mult=0.1", "data.strips=4", "callbacks.divergence.stop=false")
STEPS, HOLD = 60, 18
ADDRESSES = ("127.0.0.1", "127.0.0.2")  # torchrun numbers the ranks in the order of their machines' addresses


@pytest.fixture(scope="module")
def undisturbed(train_tiny: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One process from start to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return train_tiny(folder / "run", *SETTINGS, recording(folder / "rows"))


def machine(port: int, folder: Path, *, address: str, host: bool = False, nodes: str = "1:2") -> subprocess.Popen[str]:
    """An agent that waits 5 seconds for more machines than it needs."""
    rendezvous = (f"--nnodes={nodes}", "--max-restarts=3", f"--local-addr={address}")
    settings = f"--rdzv-conf=last_call_timeout=5,is_host={str(host).lower()}"
    named = f"hydra.run.dir={folder}/runs/${{now:%H-%M-%S-%f}}"
    recorder = recording(folder / "rows", hold_at=HOLD)
    # Without it torch 2.13 tells a new machine no address: only the first round of a rendezvous has one.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return agent(port, *rendezvous, settings, overrides=(*SETTINGS, recorder, named), variables=variables)


def killed(machine: subprocess.Popen[str], folder: Path) -> None:
    """The machine is gone: the agent, and then its processes, which would go on without it."""
    workers = children(machine.pid)
    for process in (machine.pid, *workers):
        os.kill(process, signal.SIGKILL)
    (folder / "rows" / "go").touch()


def held(folder: Path, ranks: int) -> Callable[[], bool]:
    return lambda: all((folder / "rows" / f"held{rank}").exists() for rank in range(ranks))


def rows_of(folder: Path) -> dict[int, set[int]]:
    """The rows that the ranks have trained on as batch N, in all attempts together."""
    found: dict[int, set[int]] = {}
    for path in folder.glob("rank*.jsonl"):
        for line in path.read_text().splitlines():
            number, rows = json.loads(line)
            found.setdefault(number, set()).update(rows)
    return found


def assert_as_one_process(folder: Path, expected: Finished) -> Finished:
    """One run folder, whose run has trained on the same batches and has the same numbers to rounding."""
    (path,) = (folder / "runs").iterdir()
    got = finished(path)
    assert (got.summary["status"], got.summary["steps"]) == (expected.summary["status"], STEPS)
    assert got.summary["examples"] == expected.summary["examples"]
    assert rows_of(folder / "rows") == rows_of(expected.folder.parent / "rows")
    for mine, theirs in zip(metrics(path), metrics(expected.folder), strict=True):
        assert (mine["step"], mine.keys()) == (theirs["step"], theirs.keys())
        for name in (name for name in theirs if name.startswith(("train/loss", "val/", "progressive/"))):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=2e-3, abs=1e-4), (mine["step"], name)
    weights = newest_checkpoint(path)["state_dict"]
    for name, value in newest_checkpoint(expected.folder)["state_dict"].items():
        if name.startswith("net."):
            torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-3, msg=name)
    return got


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("trainer=ddp",), {"devices": 1, "num_nodes": 1}),
        (
            ("trainer=ddp", "trainer.num_nodes=2"),
            "trainer.num_nodes is 2, but torchrun has started 1 process on 1 machine;",
        ),
        (("trainer=cpu",), {}),
    ],
)
def test_the_last_process_that_torchrun_has_left_takes_one_device_of_its_machine(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], expected: dict[str, int] | str
) -> None:
    for name, value in {"RUN_ID": "job", "ERROR_FILE": ""}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, "++trainer.accelerator=cpu"])
    with pytest.raises(UserError, match=expected) if isinstance(expected, str) else nullcontext():
        assert trainer._places(cfg) == expected


@pytest.mark.attack
@pytest.mark.parametrize("leaving", ADDRESSES)  # with rank 0, and with rank 1
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_goes_on_without_a_machine_that_leaves(
    undisturbed: Finished, tmp_path: Path, how: signal.Signals, leaving: str
) -> None:
    port, staying = free_port(), next(address for address in ADDRESSES if address != leaving)
    stays = machine(port, tmp_path, address=staying, host=True)
    leaves = machine(port, tmp_path, address=leaving)
    wait_for(held(tmp_path, 2), stays)
    if how == signal.SIGKILL:
        killed(leaves, tmp_path)
    else:
        leaves.terminate()
    said, errors = stays.communicate()

    assert stays.returncode == 0, errors
    # A signal leaves time for a checkpoint of the step. What is killed is trained again from the newest one.
    step = HOLD + 1 if how == signal.SIGTERM else 14
    assert f"goes on after step {step} " in said
    assert assert_as_one_process(tmp_path, undisturbed).summary["world_size"] == 1


@pytest.mark.attack
@pytest.mark.parametrize("joining", ADDRESSES)  # becomes rank 0, which has not seen the run; or rank 1
def test_a_machine_that_joins_trains_with_the_others(undisturbed: Finished, tmp_path: Path, joining: str) -> None:
    port, there = free_port(), next(address for address in ADDRESSES if address != joining)
    first = machine(port, tmp_path, address=there, host=True)
    wait_for(held(tmp_path, 1), first)
    second = machine(port, tmp_path, address=joining)
    said = [agent_.communicate() for agent_ in (first, second)]

    assert (first.returncode, second.returncode) == (0, 0), "".join(errors for _, errors in said)
    assert f"goes on after step {HOLD + 1} " in "".join(out for out, _ in said)
    assert assert_as_one_process(tmp_path, undisturbed).summary["world_size"] == 2


@pytest.mark.attack
def test_a_new_machine_takes_the_place_of_one_that_is_gone(undisturbed: Finished, tmp_path: Path) -> None:
    port = free_port()
    stays = machine(port, tmp_path, address=ADDRESSES[1], host=True, nodes="2")
    gone = machine(port, tmp_path, address=ADDRESSES[0], nodes="2")
    wait_for(held(tmp_path, 2), stays)
    killed(gone, tmp_path)
    new = machine(port, tmp_path, address=ADDRESSES[0], nodes="2")
    said = [agent_.communicate() for agent_ in (stays, new)]

    assert (stays.returncode, new.returncode) == (0, 0), "".join(errors for _, errors in said)
    assert "goes on after step 14 " in "".join(out for out, _ in said)
    assert assert_as_one_process(tmp_path, undisturbed).summary["world_size"] == 2
