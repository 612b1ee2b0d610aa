"""A divergence from the run to its capsule and back: bit-equal, another way, and taken apart."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ranker.capsules.capsule import MANIFEST, SNAPSHOT, share_file
from ranker.config_overrides import altered
from ranker.data.loader import WindowedLoader
from ranker.data.schema import Schema
from ranker.models.embeddings import place
from support import CALM, ROOT, TINY, TWO_RANKS, Finished, finished, train_process

Replay = Callable[..., int]
Output = pytest.CaptureFixture[str]

# Dies in its first steps.
LOST = (
    *CALM,
    "optim=adagrad",
    "lr_mult=300",
    "data.log.train_rows=25600",
    "scale.batch_size=128",
    "train.eval_every=0",
)
LARGE = ("model.net.sparse_embeddings=true", "train.checkpoint_rows_above=1e-6")  # MB


@pytest.fixture(scope="module")
def replay() -> Callable[..., int]:
    """Runs scripts/replay.py in this process; gives its exit status."""

    def call(*arguments: str) -> int:
        argv = sys.argv
        sys.argv = [str(ROOT / "scripts" / "replay.py"), *arguments]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            sys.argv = argv
        raise AssertionError("the script ends with a status")

    return call


@pytest.fixture(scope="module")
def lost(train_tiny: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train_tiny(tmp_path_factory.mktemp("lost"), *LOST, "train.warmup_steps=4", "trainer.gradient_clip_val=50")


def capsule_of(run: Finished) -> Path:
    (folder,) = (run.folder / "capsules").iterdir()
    return folder


def test_a_lost_run_leaves_a_capsule_that_loads_without_unpickling_code(lost: Finished) -> None:
    folder = capsule_of(lost)

    manifest = json.loads((folder / MANIFEST).read_text())
    assert lost.summary["status"] == "diverged"
    assert folder.name == f"step={lost.summary['divergence']['first_step']}"
    assert manifest["event"]["kind"] == "full"
    assert manifest["snapshot_step"] == 0
    assert len(manifest["steps"]) == len(manifest["signals"]) > 20
    for name in (SNAPSHOT, share_file(0)):
        assert torch.load(folder / name, weights_only=True)


def test_a_replay_reproduces_every_loss_to_the_bit(lost: Finished, replay: Replay, capsys: Output) -> None:
    assert replay(str(capsule_of(lost))) == 0

    assert "bit-equal over" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.precision=bf16-mixed"],
        pytest.param(["trainer.accumulate_grad_batches=3"], marks=pytest.mark.slow),
        pytest.param(["model.net.sparse_embeddings=true", "trainer.gradient_clip_val=5"], marks=pytest.mark.slow),
        [
            "model.net.sparse_embeddings=true",
            "trainer.gradient_clip_val=0.5",
            "trainer.gradient_clip_algorithm=value",
            "trainer.accumulate_grad_batches=2",
        ],
    ],
    ids=["half precision", "accumulated", "sparse and clipped", "sparse, clipped by value, accumulated"],
)
def test_a_replay_is_bit_equal_however_the_step_was_taken(
    train_tiny: Callable[..., Finished], replay: Replay, capsys: Output, tmp_path: Path, overrides: list[str]
) -> None:
    run = train_tiny(tmp_path, *LOST, *overrides, "callbacks.divergence.poll_every=1")
    assert run.summary["status"] == "diverged"

    assert replay(str(capsule_of(run))) == 0

    assert "bit-equal over" in capsys.readouterr().out


def test_a_replay_that_differs_says_where_and_what_else_does(
    lost: Finished, replay: Replay, capsys: Output, tmp_path: Path
) -> None:
    shutil.copytree(capsule_of(lost), tmp_path / "changed")
    path = tmp_path / "changed" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["signals"][5][0] = (1.5).hex()
    manifest["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(manifest))

    assert replay(str(tmp_path / "changed")) == 1

    said = capsys.readouterr().out
    assert f"first differs at step {manifest['steps'][5]}" in said
    assert "differs: torch 0.1 there" in said


def test_the_same_minutes_are_trained_another_way(
    lost: Finished, replay: Replay, capsys: Output, tmp_path: Path
) -> None:
    calmer = "optim=clippy lr_mult=0.1"
    status = replay(str(capsule_of(lost)), "--try", calmer, "--try", "model.net.hidden=[8,8]", "--out", str(tmp_path))

    said = capsys.readouterr().out
    assert status == 0
    assert "would have saved this run: optim=clippy lr_mult=0.1" in said
    table = json.loads((tmp_path / "replay.json").read_text())
    assert [t["name"] for t in table["trajectories"]] == ["the run", calmer, "model.net.hidden=[8,8]"]
    assert table["trajectories"][1]["losses"] != table["trajectories"][0]["losses"]
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim=clipy", "did you mean 'clippy'"),
        ("optim.lambda_rell=1", "unknown option 'optim.lambda_rell'"),
        ("data=kuairand", "'data=kuairand' cannot change in a replay"),
        ("optim=gc,clippy", "its own --try"),
        ("mitigation=wide_window", "mitigation 'wide_window' changes data.window, which a replay cannot"),
    ],
)
def test_a_wrong_override_is_one_line(lost: Finished, replay: Replay, capsys: Output, override: str, line: str) -> None:
    assert replay(str(capsule_of(lost)), override) == 2

    assert line in capsys.readouterr().err.splitlines()[0]


def test_overrides_are_put_into_the_saved_configuration(lost: Finished) -> None:
    saved = OmegaConf.load(lost.folder / "config.yaml")

    clipped = altered(saved, ["mitigation=clip_activations", "lr_mult=2"], folder=ROOT / "conf")
    swapped = altered(saved, ["optim=clippy", "optim.lambda_rel=0.25", "model=large"], folder=ROOT / "conf")

    assert (clipped.model.net.clip_activations, clipped.mitigation.name, clipped.lr_mult) == (
        10.0,
        "clip_activations",
        2,
    )
    assert clipped.model.net.hidden == saved.model.net.hidden
    assert clipped.optim == saved.optim
    assert (swapped.optim.name, swapped.optim.lambda_rel, swapped.lr_mult) == ("clippy", 0.25, saved.lr_mult)
    assert swapped.model.net.hidden == [512] * 4  # of the run's scale
    assert (saved.lr, clipped.lr) == (300 * 0.4, 2 * 0.4)


def test_a_folder_that_is_no_capsule_is_one_line(replay: Replay, capsys: Output, tmp_path: Path) -> None:
    assert replay(str(tmp_path)) == 2

    assert f"no {MANIFEST} in {tmp_path}" in capsys.readouterr().err


def test_a_bisection_finds_what_was_planted_in_a_run(
    train_tiny: Callable[..., Finished],
    replay: Replay,
    capsys: Output,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, places = 70, [5, 50, 77]
    cut, rows = WindowedLoader._cut, []

    def with_planted_rows(self, *given):
        batches, known = cut(self, *given)
        for batch in batches:
            if batch.number == step - 1:
                batch.dense_BF[places, 7] = 1e3 * batch.dense_BF[places, 7].abs().clamp(min=1.0)
                rows[:] = batch.row_B[places].tolist()
        return batches, known

    monkeypatch.setattr(WindowedLoader, "_cut", with_planted_rows)
    run = train_tiny(
        tmp_path,
        "optim=adagrad",
        "lr_mult=0.5",
        "data.log.train_rows=11520",
        "scale.batch_size=128",
        "train.eval_every=0",
        "train.progressive=false",
        *CALM,
    )

    assert replay(str(capsule_of(run)), "--bisect", "--lookback", "2", "--horizon", "6") == 0

    found = json.loads((capsule_of(run) / "bisect.json").read_text())
    assert found["step"] == found["event"]["step"] == step
    assert found["features"]["names"] == ["signal_04"]
    assert found["rows"]["row_ids"] == sorted(rows)
    assert "at most" in capsys.readouterr().out


@pytest.mark.slow
def test_before_and_after_a_rollback_each_divergence_has_a_capsule_of_its_own(
    train_tiny: Callable[..., Finished],
    replay: Replay,
    capsys: Output,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = WindowedLoader._cut

    def with_a_broken_batch(self, *given):
        batches, known = cut(self, *given)
        for batch in batches:
            if batch.number == 60:
                batch.dense_BF[:] = torch.inf
        return batches, known

    monkeypatch.setattr(WindowedLoader, "_cut", with_a_broken_batch)
    once = ("callbacks.rollback.tries=1", "callbacks.rollback.skip_batches=0", "callbacks.rollback.lr_factor=0.5")
    run = train_tiny(tmp_path, *CALM, *once, "lr_mult=0.2", "data.log.train_rows=25600", "train.eval_every=0")
    capsys.readouterr()

    capsules = sorted((run.folder / "capsules").iterdir(), key=lambda path: int(path.name.removeprefix("step=")))

    (rollback,) = run.summary["rollbacks"]
    steps = [json.loads((folder / MANIFEST).read_text())["snapshot_step"] for folder in capsules]
    assert len(capsules) == 2
    assert steps[0] < 61 < rollback["step"] <= steps[1]
    assert [replay(str(folder)) for folder in capsules] == [0, 0]
    assert capsys.readouterr().out.count("bit-equal over") == 2
    assert replay(str(capsules[1]), "optim=gc") == 0
    assert "learning rate times 0.5, as in the run" in capsys.readouterr().out


def test_a_capsule_of_large_tables_has_the_used_rows_and_replays_as_any_other(
    train_tiny: Callable[..., Finished], replay: Replay, capsys: Output, tmp_path: Path
) -> None:
    run = train_tiny(tmp_path, *LOST, *LARGE)
    folder = capsule_of(run)
    state, schema = torch.load(folder / SNAPSHOT, weights_only=True), Schema.from_yaml(folder / "schema.yaml")
    assert {len(x) for name, x in state["net"].items() if ".dim_" in name} == set(place(schema)[1].values())
    every = Schema.from_yaml(run.folder / "schema.yaml")
    assert sum(f.rows for f in schema.categorical) < sum(f.rows for f in every.categorical)

    assert replay(str(folder)) == 0
    assert "bit-equal over" in capsys.readouterr().out
    assert replay(str(folder), "--try", "optim=clippy lr_mult=0.1", "--out", str(tmp_path)) == 0
    assert "would have saved this run: optim=clippy lr_mult=0.1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("tables", [(), LARGE], ids=["", "large tables"])
def test_two_ranks_leave_one_capsule_that_one_process_replays_to_the_bit(
    replay: Replay, capsys: Output, tmp_path: Path, tables: tuple[str, ...]
) -> None:
    process = train_process(*TINY, *LOST, *TWO_RANKS, *tables, f"hydra.run.dir={tmp_path}")
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    folder = capsule_of(finished(tmp_path))

    assert replay(str(folder)) == 0

    assert json.loads((folder / MANIFEST).read_text())["world_size"] == 2
    assert "2 ranks replayed one after the other" in (said := capsys.readouterr().out)
    assert "bit-equal over" in said
