"""A mistake ends in one line that says what is wrong and what to do, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

MISTAKES = [
    (["model=larg"], "unknown model 'larg'", "'large'"),
    (["optim=clipy"], "unknown optim 'clipy'", "'clippy'"),
    (["data=kuairnd"], "unknown data 'kuairnd'", "'kuairand'"),
    (["optim.lamda_rel=1"], "unknown option 'optim.lamda_rel'", "'lambda_rel'"),
    (["lr_mul=2"], "unknown option 'lr_mul'", "'lr_mult'"),
    (["lr_mult=abc"], "lr_mult", "abc"),
    (["lr_mult=0"], "lr_mult must be a number above 0", "0"),
    (["lr_mult=-1"], "lr_mult must be a number above 0", "-1"),
    (["lr_mult=nan"], "lr_mult must be a number above 0", "nan"),
    (
        ["data=parquet", "data.root=/a/date=2024"],
        "cannot be read",
        "needs quotes of its own: 'data.root=\"/a/date=2024\"'",
    ),
    (["data=parquet", "data.root=~/x"], "cannot be read", "'data.root=\"~/x\"'"),
    (["scale.batch_size=1e3"], "batch_size must be a whole number such as 1000", "1000.0"),
    (["seed=-1"], "seed must be 0 or more", "-1"),
    (["data=kuairand"], "data=kuairand needs data.source=DIR", ""),
    (["data=kuairand", "data.source=/nowhere"], "/nowhere", ""),
    (["data=parquet"], "data=parquet needs data.source=DIR", ""),
    (["data=parquet", "data.source=/nowhere"], "/nowhere", ""),
    (["data=parquet", "data.root=/nowhere"], "/nowhere", ""),
    (["data.tasks=[clik]"], "has no task 'clik'", "did you mean 'click'"),
    (["data.drop_features=[usr]"], "has no feature 'usr'", ""),
    (["optim.lambda_rel=-1"], "lambda_rel", "-1"),
    (["trainer=gpu"], "no GPU is visible", "trainer=cpu"),
    (["trainer.devices=2"], "trainer.accelerator=cpu", ""),
    (["trainer.devices=0"], "trainer.devices must be 1 or more", "0"),
    (["data.window=0"], "window", "0"),
    (["data.window=6x"], "window", "6x"),
    (["scale.batch_size=0"], "scale.batch_size must be 1 or more", ""),
    (
        ["callbacks.divergence.settings.patiance=30"],
        "unknown option 'callbacks.divergence.settings.patiance'",
        "'patience'",
    ),
    (
        ["+callbacks.divergence.settings.patiance=30"],
        "callbacks.divergence.settings: no setting 'patiance'",
        "'patience'",
    ),
    (["callbacks.divergence.settings.patience=0"], "patience must be a number above 0", "0"),
    (["+callbacks.snapshots.evry=5"], "callbacks.snapshots", "evry"),
    (["callbacks.rollback.tries=1", "~callbacks.snapshots"], "callbacks.rollback needs", "callbacks.snapshots"),
    (["callbacks.rollback.tries=1", "~callbacks.divergence"], "callbacks.rollback needs", "callbacks.divergence"),
    (["logger=wandbb"], "unknown logger 'wandbb'", "'wandb'"),
    (["optim=base"], "unknown optim 'base'", "known: adagrad, "),
    (["lr=0.1"], "lr is data.base_lr.laptop times lr_mult", ""),
    (["+logger.mine._target_=builtins.dict"], "logger.mine gives a dict", ""),
    (["resume=/nowhere"], "no config.yaml in /nowhere", ""),
    (["train.max_steps=0"], "train.max_steps must be", "0"),
    (["train.epochs=0"], "train.epochs must be 1 or more", "0"),
    (["train.checkpoint_rows_above=-1"], "train.checkpoint_rows_above must be 0", "-1"),
    (["train.checkpoint_full_share=2"], "train.checkpoint_full_share must be above 0 and at most 1", "2"),
    (["+embeddings.tables.user_id=row_wise"], "embeddings.tables is for sharded tables", "embeddings=torchrec"),
    (["+trainer.max_epochs=3"], "trainer.max_epochs is set by this project", "use train.epochs"),
    (["+trainer.val_check_interval=3"], "trainer.val_check_interval is set by this project", "train.eval_every"),
    (["objective=test/clik/auc"], "objective=test/clik/auc is not a metric of this run", "'test/click/auc'"),
    (["objective=val/click/auc"], "objective=val/click/auc is not a metric of this run", "'test/click/auc'"),
    (["objective=test/click/calibration"], "objective=test/click/calibration is not a metric", "logloss"),
]


@pytest.mark.parametrize(("overrides", "what", "hint"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_said_in_one_line(
    overrides: list[str],
    what: str,
    hint: str,
    command_line: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line("logger=csv", *overrides, f"hydra.run.dir={tmp_path}")

    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert lines[0].startswith("error: ")
    assert what in lines[0]
    assert hint in lines[0]
    assert lines[1:] == ["(HYDRA_FULL_ERROR=1 shows where)"]
    assert not (tmp_path / "summary.json").exists()
