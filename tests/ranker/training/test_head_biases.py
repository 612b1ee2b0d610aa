"""The biases of the heads start at the constants that fit the first window's labels."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from ranker.data.datamodule import RankingDataModule
from ranker.data.synthetic import SyntheticLog
from ranker.errors import UserError
from ranker.losses import MultitaskLoss, best_constants
from ranker.models import SharedBottom
from ranker.training.module import RankingModule

WINDOW = 512


def fitted(head_bias: str, **fit: str) -> tuple[RankingModule, SyntheticLog]:
    """A module after one step at a rate of 0, so that its weights are still the first ones."""
    log = SyntheticLog(train_rows=1024, eval_rows=64, rows_per_day=1024, num_users=50, num_items=20, embedding_dim=2)
    torch.manual_seed(0)
    module = RankingModule(
        SharedBottom(log.schema, hidden=[4]),
        schema=log.schema,
        optimizer=lambda model_or_params, lr: torch.optim.SGD(model_or_params.parameters(), lr=lr),
        lr=0.0,
        head_bias=head_bias,
        progressive=False,
    )
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", limit_val_batches=0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=RankingDataModule(log, batch_size=64, window=WINDOW), **fit)
    return module, log


def biases(module: RankingModule) -> list[float]:
    return [float(module.get_parameter(f"net.{name}.bias").detach()) for name in module.net.head_names().values()]


def test_biases_are_log_odds_and_means_of_the_first_window_only():
    module, log = fitted("labels")
    first = log.read(0, WINDOW)
    for t, (task, bias) in enumerate(zip(log.schema.tasks, biases(module), strict=True)):
        y = first.labels_BT[:, t][first.mask_BT[:, t]].double()
        n, ones = len(y), float(y.sum())
        expected = torch.tensor((ones + 1) / (n - ones + 1)).log() if task.type == "binary" else y.mean()
        assert bias == pytest.approx(float(expected), rel=1e-5), task.name


def test_zero_keeps_the_models_own():
    assert biases(fitted("zero")[0]) == [0.0] * len(fitted("zero")[1].schema.tasks)


def test_a_resumed_fit_keeps_the_biases_of_its_checkpoint(tmp_path):
    module, _ = fitted("zero")
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert biases(fitted("labels", ckpt_path=str(tmp_path / "a.ckpt"))[0]) == biases(module)


def test_the_constants_minimise_the_loss():
    log = SyntheticLog(train_rows=4096, eval_rows=64, rows_per_day=4096)
    rows = log.read(0, 4096)
    logits_T = best_constants(log.schema, rows.labels_BT, rows.mask_BT).requires_grad_()
    loss = MultitaskLoss(log.schema)(logits_T.expand_as(rows.labels_BT), rows.labels_BT, rows.mask_BT)
    loss.total.backward()
    assert logits_T.grad is not None
    assert logits_T.grad.abs().max() < 2e-3, "one label of each kind is added, so it is not exactly 0"


def test_a_task_without_labels_or_positives_has_a_finite_constant():
    log = SyntheticLog(train_rows=64, eval_rows=64, rows_per_day=64)
    rows = log.read(0, 64)
    labels_BT = torch.where(rows.mask_BT, 0.0, torch.nan)
    constants_T = best_constants(log.schema, labels_BT, rows.mask_BT & False)
    assert constants_T.tolist() == [0.0] * len(log.schema.tasks)
    assert best_constants(log.schema, labels_BT, rows.mask_BT).isfinite().all()


def test_an_unknown_start_is_refused():
    with pytest.raises(UserError, match=r"train.head_bias 'label' is unknown; .*labels"):
        fitted("label")
