"""Runs with ``embeddings=torchrec`` as a user starts them: killed, resumed on other ranks, exported, refused."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from broken_log import ROLLBACK, SETTINGS, write_log
from ranker.capsules.capsule import Capsule
from ranker.commands.replay_command import replay
from ranker.export.release import Candidate, Weights
from ranker.parts import make_net, open_log
from ranker.replay.engine import Engine
from ranker.replay.rebuild import build_engine
from ranker.runs.checkpoint_files import by_step, step_of
from ranker.runs.run_folder import RunFolder
from ranker.trust import load_config
from sharded_support import command_on_ranks, trained
from support import TINY, TWO_RANKS, finished, metrics

pytest.importorskip("torchrec", reason="make test-torchrec installs it and runs this")

SHARDED = (
    *TINY,
    "embeddings=torchrec",
    "train.checkpoint_every=5",
    "callbacks.snapshots.every=4",
    "train.eval_every=6",
)
TIMED = ("speed/", "time/", "system/")


def curves(folder: Path) -> list[dict[str, str]]:
    return [{name: x for name, x in row.items() if not name.startswith(TIMED)} for row in metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Weights.read(by_step(folder / "checkpoints")[-1]).net)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks from start to end."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    trained(*SHARDED, *TWO_RANKS, "embeddings.plan=row_wise", f"hydra.run.dir={folder}")
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed with SIGKILL after the checkpoint of step 10."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    ranks = command_on_ranks([*SHARDED, *TWO_RANKS, "embeddings.plan=row_wise", f"hydra.run.dir={folder}"], 2)
    while not any(step_of(path) == 10 for path in by_step(folder / "checkpoints")):
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.join()
    for path in by_step(folder / "checkpoints"):  # where a faster run would have come further
        if step_of(path) > 10:
            path.unlink()
    return folder


def test_a_killed_run_goes_on_to_the_same_bits(straight: Path, killed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")

    trained(f"resume={folder}")

    assert curves(folder) == curves(straight)
    for name, values in weights(straight).items():
        assert torch.equal(weights(folder)[name], values), name
    assert finished(folder).summary["status"] == "completed"
    kept = {path.stem for path in by_step(folder / "checkpoints")}
    there = {path.name for path in (folder / "checkpoints" / "shards").iterdir()}
    assert kept <= there
    assert len(there) <= 5  # three by step, the best, and the one that is removed next


def test_it_goes_on_on_another_number_of_ranks_under_another_plan(
    straight: Path, killed: Path, tmp_path: Path, command_line: Any
) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")

    command_line(f"resume={folder}", "embeddings.plan=table_wise", "trainer.devices=1", "trainer.strategy=auto")

    for name, values in weights(straight).items():
        torch.testing.assert_close(weights(folder)[name], values, rtol=1e-4, atol=1e-5, msg=name)


def test_damaged_tables_are_passed_over(killed: Path, tmp_path: Path, command_line: Any, capsys: Any) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    part = next((folder / "checkpoints" / "shards" / "step=10").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])

    with pytest.raises(SystemExit):
        command_line(f"resume={folder}", "embeddings.optimizer=rowwise_adagrad")
    assert "embeddings.optimizer is adagrad and cannot change" in capsys.readouterr().err
    command_line(f"resume={folder}", "trainer.devices=1", "trainer.strategy=auto", "train.max_steps=7")

    said = capsys.readouterr()
    assert "step=10.ckpt is damaged" in said.out + said.err
    assert "goes on after step 5" in said.out


def built(capsule: Capsule) -> Engine:
    """An engine in the state of a capsule."""
    engine = build_engine(load_config(capsule.config), capsule.schema)
    engine.restore(capsule.state)
    return engine


def test_a_rollback_takes_the_tables_along_and_a_capsule_has_their_rows(tmp_path: Path, capsys: Any) -> None:
    log = write_log(tmp_path / "log")
    words = (*SETTINGS, f"data.root={log}", *ROLLBACK, "callbacks.snapshots.every=5", "train.log_every=1")
    common = (*words, "train.max_steps=90", "train.checkpoint_every=90", "callbacks.rollback.lr_factor=0.5")
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"

    trained(*common, f"hydra.run.dir={alone}", world=1)
    sharded = ("embeddings=torchrec", "embeddings.plan=row_wise", *TWO_RANKS)
    trained(*common, *sharded, f"hydra.run.dir={ranks}")

    (own,), (gathered,) = (sorted((folder / "capsules").iterdir()) for folder in (alone, ranks))
    assert own.name == gathered.name
    whole, rows = Capsule.load(own), Capsule.load(gathered)
    assert (rows.manifest.sharded, rows.manifest.world_size) == (True, 2)
    found, wanted = (built(capsule).state() for capsule in (rows, whole))
    for dim, places in rows.places.items():
        name = f"embeddings.tables.dim_{dim}.weight"
        torch.testing.assert_close(found.net[name], wanted.net[name][places], rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    assert replay([str(gathered)]) == 0
    assert "equal to rounding" in capsys.readouterr().out
    assert replay([str(gathered), "--try", "optim=clippy lr_mult=0.1"]) == 0
    assert "carried over: " in capsys.readouterr().out

    back = finished(alone).summary["rollbacks"]
    assert len(back) == 1  # the log does break the run
    assert finished(ranks).summary["rollbacks"] == back
    for name, values in weights(alone).items():
        assert values.isfinite().all()
        torch.testing.assert_close(weights(ranks)[name], values, rtol=1e-3, atol=1e-4, msg=name)


def test_rowwise_adagrad_rolls_back_and_leaves_no_capsule_and_says_so(
    tmp_path: Path, command_line: Any, capsys: Any
) -> None:
    words = (*SETTINGS, f"data.root={write_log(tmp_path / 'log')}", *ROLLBACK, "callbacks.snapshots.every=5")
    words = (*words, "train.max_steps=90", "train.checkpoint_every=90", "callbacks.rollback.lr_factor=0.5")
    sharded = ("embeddings=torchrec", "embeddings.optimizer=rowwise_adagrad")

    command_line(*words, *sharded, f"hydra.run.dir={tmp_path / 'run'}")

    assert "callbacks.capsules switched off" in capsys.readouterr().out
    assert len(finished(tmp_path / "run").summary["rollbacks"]) == 1  # the log does break the run
    assert not list((tmp_path / "run").glob("capsules/step=*"))


def test_an_export_gathers_the_tables_and_scores_as_the_run(straight: Path) -> None:
    cfg = RunFolder.existing(straight).load_config()
    log, path = open_log(cfg), by_step(straight / "checkpoints")[-1]

    local = Candidate.load(make_net(cfg, log.schema), Weights.read(path), log=log, eval_batch_size=2048)
    found, _ = local.evaluate()

    wanted = finished(straight).summary["metrics"]
    names = [name for name in found if name.endswith(("/auc", "/ne", "/rmse"))]
    assert len(names) > 6
    for name in names:
        assert found[name] == pytest.approx(wanted[f"test/{name}"], rel=1e-5), name


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.accumulate_grad_batches=2", "the tables would move at each batch"),
        ("trainer.gradient_clip_val=1", "cannot see the tables' gradients"),
        ("optim.on_nonfinite=skip", "cannot leave out a step of the tables"),
        ("optim.embedding=null", "not by that of the layers; set optim.embedding.method=adagrad"),
        ("+optim.embedding.weight_decay=0.1", "optim.embedding.weight_decay=0.1 is not supported"),
        ("callbacks.sharpness.every=5", "callbacks.sharpness looks on one rank alone"),
        ("callbacks.snapshots.disk=1", "set callbacks.snapshots.disk=0"),
        ("train.compile=true", "train.compile=true is not supported"),
        ("embeddings.plan=rowwise", "embeddings.plan"),
        ("+embeddings.tables.nobody=row_wise", "no table 'nobody'; tables: user_id, item_id"),
        ("embeddings.memory_gib=1e-6", "torchrec finds no plan for 8 tables on 1 processes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    word: str, said: str, command_line: Any, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as left:
        command_line(*TINY, "embeddings=torchrec", f"hydra.run.dir={tmp_path / 'run'}", word)

    error = capsys.readouterr().err
    assert left.value.code == 2
    assert said in error
    assert len(error.strip().splitlines()) <= 2  # and where to see more
