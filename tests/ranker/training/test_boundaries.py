"""Boundaries inside a run that goes back: each window begins as it did the first time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ranker.config import WarmStartSettings
from ranker.training.boundaries import Boundaries
from ranker.training.rollback import Rollback
from ranker.training.snapshots import SnapshotRing
from ranker.training.stability_callback import Stability
from scripted_verdicts import Verdicts

SETTINGS = WarmStartSettings(accumulators="decay", half_life_rows=500, at_windows=True)  # windows of 8 batches


class Begun(Callback):
    """The accumulators of a layer and the learning rate with which each batch begins, by its number."""

    def __init__(self, rewarm_steps: int = 0) -> None:
        self.seen: list[tuple[int, Tensor, float]] = []
        self._rewarm_steps = rewarm_steps

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module._rewarm_steps = self._rewarm_steps

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, *_: object) -> None:
        optimizer = trainer.optimizers[0]
        weight = next(p for name, p in module.net.named_parameters() if not name.startswith("embeddings."))
        total = optimizer.state[weight]["sum"].clone() if weight in optimizer.state else torch.zeros(1)
        self.seen.append((batch.number, total, optimizer.param_groups[0]["lr"]))


def begun(fit: Callable[..., pl.Trainer], verdicts: dict[int, int], *, skip: int, rewarm: int = 0) -> Begun:
    rollback = Rollback(tries=1, back_steps=2, skip_batches=skip)
    stability = Stability(
        divergence=Verdicts(verdicts),
        snapshots=SnapshotRing(every=4, keep=4),
        rollback=rollback,
        say=lambda *_, **__: None,
    )
    seen = Begun(rewarm)
    fit([Boundaries(SETTINGS, stability), seen], stability=stability, max_steps=32)
    assert len(rollback.done) == 1
    return seen


@pytest.mark.parametrize("skip", [0, 3])
def test_a_window_is_begun_again_after_going_back_to_the_end_of_the_one_before(
    fit: Callable[..., pl.Trainer], skip: int
) -> None:
    seen = begun(fit, {20: 18}, skip=skip).seen  # back to step 16, after the last batch of the second window
    first = next(total for number, total, _ in seen if number == 16)
    again = seen[20]
    assert again[0] == 16 + skip
    assert torch.equal(again[1], first)


def test_a_warm_up_after_a_rollback_begins_with_its_window(fit: Callable[..., pl.Trainer]) -> None:
    seen = begun(fit, {14: 13}, skip=0, rewarm=4).seen  # back to step 8
    rates = [rate / 0.1 * 30 / (number + 1) for number, _, rate in seen[14:] if 14 <= number < 20]
    assert rates == pytest.approx([1, 1, 0.25, 0.5, 0.75, 1])
