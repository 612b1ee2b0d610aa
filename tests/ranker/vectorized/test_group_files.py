"""What a replica of a group leaves beside its metrics: checkpoints, from which it goes on, early signs and capsules."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ranker import stop_signals
from ranker.replay.session import Session
from ranker.vectorized import group
from support import Finished, metrics
from vectorized_support import QUICK_VERDICT, summary

Train = Callable[..., list[Path]]
OFTEN = ("train.checkpoint_every=6", "callbacks.early_signs.every=3", "callbacks.early_signs.task_gradients=2")
LOST = ("optim=adagrad", "lr_mult=200", "callbacks.divergence.poll_every=2")


def checkpoints(folder: Path) -> dict[str, Any]:
    files = sorted((folder / "checkpoints").rglob("*.ckpt"))
    return {str(file.relative_to(folder)): torch.load(file, weights_only=True) for file in files}


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    """The same keys, shapes and numbers, up to rounding."""
    if isinstance(one, torch.Tensor):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, equal_nan=True, msg=where)
        else:
            assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{where}[{place}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True), where
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def alone(train_tiny: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run alone whose job the groups of these tests have as well."""
    return train_tiny(tmp_path_factory.mktemp("run") / "alone", *OFTEN, *JOBS[1]).folder


JOBS = [("seed=0", "optim=gc"), ("seed=1", "train.warmup_steps=9"), ("seed=2", "lr_mult=0.5")]


def test_checkpoints_and_early_signs_are_those_of_the_run_alone(train_jobs: Train, alone: Path) -> None:
    folder = train_jobs("together", *((*OFTEN, *job) for job in JOBS))[1]

    mine, its = checkpoints(folder), checkpoints(alone)
    assert {Path(name).name for name in mine} >= {"step=18.ckpt", "step=24.ckpt"}
    for saved in (*mine.values(), *its.values()):
        # Lightning's own evaluations, which a group makes for all of its replicas, have a progress of their own.
        loops = saved["loops"]["fit_loop"]
        for name in [name for name in loops if "val_loop" in name]:
            del loops[name]
    assert_alike(mine, its)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {p.name for p in (alone / "checkpoints").iterdir()}
    signs, others = (
        [{name: float(x) for name, x in row.items() if name.startswith(("signs/", "sigma/"))} for row in metrics(f)]
        for f in (folder, alone)
    )
    assert sum(any(name.endswith("/grad_norm") for name in row) for row in signs) == 8
    assert any(name.startswith("signs/task_cosine/") for row in signs for name in row)
    assert any(name.endswith("/dead_relus") for row in signs for name in row)
    assert_alike(signs, others)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends the next group before a step."""

    def call(step: int) -> None:
        plain, left = group._Group.step, [True]

        def broken(self: Any, batches: Any) -> None:
            if self.taken == step and left:
                left.clear()
                raise Killed
            plain(self, batches)

        monkeypatch.setattr(group._Group, "step", broken)

    return call


@pytest.mark.parametrize("order_seed", [0, pytest.param(None, marks=pytest.mark.slow)])  # 0: as in a sweep
def test_a_killed_group_goes_on_from_its_checkpoints_as_if_nothing_had_been(
    train_jobs: Train, kill: Callable[[int], None], command_line: Callable[..., None], order_seed: int | None
) -> None:
    jobs = [(*OFTEN, *QUICK_VERDICT, *job) for job in ((*LOST, "seed=4"), *JOBS)]
    whole = train_jobs("whole", *jobs, order_seed=order_seed)

    kill(20)
    with pytest.raises(Killed):
        train_jobs("killed", *jobs, order_seed=order_seed)
    lost, *folders = train_jobs("killed", *jobs, order_seed=order_seed, only=())
    assert summary(lost)["status"] == "diverged"
    assert summary(lost)["steps"] < 18
    assert not any((folder / "summary.json").is_file() for folder in folders)
    train_jobs("killed", *jobs, order_seed=order_seed, only=(1, 2), from_step=18)
    command_line(f"resume={folders[2]}", f"hydra.run.dir={folders[2]}/unused")  # one of them alone

    for before, after in zip(whole[1:], folders, strict=True):
        one, other = summary(before), summary(after)
        assert one.pop("metrics") == pytest.approx(other.pop("metrics"), rel=1e-3, nan_ok=True)
        assert one.pop("adapted") == pytest.approx(other.pop("adapted"), rel=1e-3)
        assert one == other
        assert_alike(*({p: x["state_dict"] for p, x in checkpoints(f).items()} for f in (before, after)))
    for before, after in zip(whole[1:3], folders[:2], strict=True):
        assert (before / "metrics.csv").read_bytes() == (after / "metrics.csv").read_bytes()
    for before, after in zip(metrics(whole[3]), metrics(folders[2]), strict=True):
        assert_alike({k: float(x) for k, x in before.items()}, {k: float(x) for k, x in after.items()})
    said = json.loads((folders[2] / "summary.json").read_text())
    assert said.get("order_seed") == order_seed
    assert "vectorized" not in said


def test_a_signal_ends_all_replicas_at_one_step_with_their_checkpoints(
    train_jobs: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    signals = iter([0, 0, 0])  # asked for once a step
    monkeypatch.setattr(stop_signals, "received", lambda: next(signals, signal.SIGTERM))

    with pytest.raises(stop_signals.Stopped):
        train_jobs("stopped", *((*job, "train.checkpoint_every=0") for job in JOBS[:2]))

    for folder in (tmp_path / "stopped0", tmp_path / "stopped1"):
        assert [path.name for path in (folder / "checkpoints").glob("*.ckpt")] == ["step=4.ckpt"]
        said = summary(folder)
        assert said["status"] == "failed"
        assert said["reason"].startswith("interrupted at step 4 by SIGTERM; go on with: ")
    assert not stop_signals._STATE.gentle


def test_the_capsule_of_a_lost_replica_replays(
    train_jobs: Train, train_tiny: Callable[..., Finished], tmp_path: Path
) -> None:
    jobs = [(*QUICK_VERDICT, "seed=0"), (*QUICK_VERDICT, *LOST, "seed=1", "callbacks.snapshots.every=2")]

    folder = train_jobs("together", *jobs)[1]
    really = train_tiny(tmp_path / "really", *jobs[1]).folder

    (mine,), (its,) = (list((f / "capsules").iterdir()) for f in (folder, really))
    assert mine.name == its.name
    assert {p.name for p in mine.iterdir()} == {p.name for p in its.iterdir()}
    session, alone = Session(mine), Session(its)
    one, other = session.capsule, alone.capsule
    assert one.manifest.grouped
    for name in ("snapshot_step", "steps", "numbers", "tasks", "accumulate", "seed", "note"):
        assert getattr(one.manifest, name) == getattr(other.manifest, name)
    assert_alike(one.state.net, other.state.net)
    assert_alike(one.state.optimizer, other.state.optimizer)
    assert session.reproduce()
    for capsule in (session, alone):
        capsule.recorded.signals_SN.mul_(1 + 1e-6)  # as another processor may round the products of a group
    assert session.reproduce()
    assert not alone.reproduce()
