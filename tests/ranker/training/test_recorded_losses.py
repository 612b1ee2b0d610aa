"""What metrics.csv holds of a training step."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from lightning_support import LOG, trained
from ranker.data.batch import Batch

TASK = LOG.schema.task_names[0]


class Record(Callback):
    """Records every step, and takes the labels of one task out of the third batch."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, index: int) -> None:
        if index == 2:
            batch.mask_BT[:, 0] = False

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: object) -> None:
        module.record_step()


def test_a_task_without_labels_in_a_batch_has_no_loss_and_an_event_has_its_point() -> None:
    module, recorder = trained(Record())

    assert sorted(recorder.rows) == [3, 6], "log_every=3"
    assert f"train/{TASK}/loss" not in recorder.rows[3]
    assert recorder.rows[6][f"train/{TASK}/loss"] > 0
    module.record_event(2)
    assert recorder.rows[2]["train/loss"] > 0
    assert recorder.rows[2]["lr"] == recorder.rows[3]["lr"]
