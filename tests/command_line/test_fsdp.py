"""Sharded weights on two processes: the numbers of one process, and checkpoints that any run can go on from."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from ranker import config
from ranker.data.synthetic import synthetic_schema
from ranker.errors import UserError
from ranker.models.embeddings import EmbeddingTables
from ranker.training.fsdp import with_what_works
from support import (
    ROOT,
    TINY,
    Finished,
    assert_equal,
    finished,
    metrics,
    newest_checkpoint,
    ranks_of,
    train_process,
    wait_for,
)

SHARDED = ("trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu")
LONGER = ("data.log.train_rows=15360", "train.checkpoint_every=7", "train.eval_every=20", "train.log_every=1")


def assert_close(got: Path, expected: Path) -> None:
    """Compares losses, weights and accumulators to what the order of sums changes."""
    for mine, theirs in zip(metrics(got), metrics(expected), strict=True):
        for name in (name for name in theirs if name.startswith(("train/", "val/", "progressive/"))):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=2e-3, abs=1e-4), (mine["step"], name)
    mine, theirs = newest_checkpoint(got), newest_checkpoint(expected)
    for name, value in theirs["state_dict"].items():
        if name.startswith("net."):
            torch.testing.assert_close(mine["state_dict"][name], value, rtol=1e-2, atol=1e-3, msg=name)
    for number, state in theirs["optimizer_states"][0]["state"].items():
        for name in (name for name in state if isinstance(state[name], torch.Tensor) and state[name].ndim):
            torch.testing.assert_close(
                mine["optimizer_states"][0]["state"][number][name], state[name], rtol=1e-2, atol=1e-3
            )


def without_step_cut(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without a sign that begins anew when a run with shards resumes."""
    return [{name: value for name, value in row.items() if "step_cut" not in name} for row in metrics(folder)]


@pytest.mark.parametrize(
    ("optim", "model"),
    [
        ("clippy", "small"),
        *(
            pytest.param(optim, model, marks=pytest.mark.slow)
            for optim, model in [("agc", "large_dcn"), ("gc", "ple"), ("lamb", "moe"), ("clippy_adam", "small")]
        ),
    ],
)
def test_two_processes_with_shards_train_as_one(
    train_tiny: Callable[..., Finished], tmp_path: Path, optim: str, model: str
) -> None:
    settings = ("train.max_steps=10", f"optim={optim}", f"model={model}", "lr_mult=0.1", "train.eval_every=0")
    settings = (*settings, "train.log_every=1", "scale.eval_batch_size=1000")
    one = train_tiny(tmp_path / "one", *settings)

    process = train_process(*TINY, *settings, *SHARDED, f"hydra.run.dir={tmp_path / 'two'}")
    output, errors = process.communicate()

    assert process.returncode == 0, errors
    assert not [line for line in errors.splitlines() if "Warning" in line]
    assert output.count("trainer=fsdp: callbacks.early_signs.every") == 1
    two = finished(tmp_path / "two")
    assert two.summary["world_size"] == 2
    for name, value in one.summary["metrics"].items():
        assert two.summary["metrics"][name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
    assert_close(two.folder, one.folder)


@pytest.mark.attack
def test_a_run_that_was_killed_ends_as_if_it_had_not_been_and_goes_on_anywhere(
    train_tiny: Callable[..., Finished], command_line: Callable[..., None], tmp_path: Path
) -> None:
    process = train_process(*TINY, *LONGER, *SHARDED, f"hydra.run.dir={tmp_path / 'whole'}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    process = train_process(*TINY, *LONGER, *SHARDED, f"hydra.run.dir={tmp_path / 'killed'}")
    wait_for(lambda: bool(list((tmp_path / "killed" / "checkpoints").glob("step=7.ckpt"))), process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, errors = process.communicate()
    assert "rank 1 was killed by SIGKILL; go on with: " in errors
    assert newest_checkpoint(tmp_path / "killed")["global_step"] < 60

    again = train_process(f"resume={tmp_path / 'killed'}")
    _, errors = again.communicate()

    assert again.returncode == 0, errors
    assert without_step_cut(tmp_path / "killed") == without_step_cut(tmp_path / "whole")
    for part in ("global_step", "state_dict", "optimizer_states", "train_auc_by_rank"):
        expected, got = (newest_checkpoint(tmp_path / name)[part] for name in ("whole", "killed"))
        assert_equal(expected, got, part)

    one = train_tiny(tmp_path / "one", *LONGER, "train.max_steps=14", "lr_mult=0.1")
    more = train_process(f"resume={one.folder}", "train.max_steps=20", *SHARDED)
    _, errors = more.communicate()
    assert more.returncode == 0, errors
    alone = train_tiny(tmp_path / "alone", *LONGER, "train.max_steps=20", "lr_mult=0.1")
    assert_close(one.folder, alone.folder)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("mitigation=rollback", r"callbacks\.rollback\.tries=\d+ goes back"),
        ("train.average_decay=0.99", r"train\.average_decay=0\.99 averages"),
        ("model.net.sparse_embeddings=true", "makes gradients that cannot be sharded"),
        ("callbacks.sharpness.every=10", "multiplies with a Hessian"),
        ("embeddings=torchrec", "has tables that are sharded already"),
        ("warm_start.path=runs/x", "takes over whole weights"),
        ("trainer.precision=16-mixed", "precision=16-mixed is not tested"),
    ],
)
def test_what_needs_whole_weights_is_refused(override: str, said: str) -> None:
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plain = compose("config", overrides=["trainer=fsdp"])
        cfg = compose("config", overrides=["trainer=fsdp", override])
    reduced, off = with_what_works(plain)
    assert off == ["callbacks.early_signs.every", "callbacks.snapshots.every", "callbacks.capsules"]
    assert (reduced.callbacks.capsules, plain.callbacks.early_signs.every) == (None, 20)
    with pytest.raises(UserError, match=said):
        with_what_works(cfg)


def test_tables_that_admit_ids_by_count_are_refused() -> None:
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["trainer=fsdp"])
    plain = synthetic_schema(num_users=20, num_items=20, signals=0, embedding_dim=4)
    first, *others = plain.categorical
    counted = replace(plain, categorical=(replace(first, admit_after=2), *others))
    for schema, refused in ((plain, False), (counted, True)):
        net = nn.Module()
        net.embeddings = EmbeddingTables(schema)
        with pytest.raises(UserError, match="admits ids by count") if refused else nullcontext():
            with_what_works(cfg, net)
