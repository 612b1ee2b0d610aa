from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from ranker.data.datamodule import RankingDataModule
from ranker.errors import UserError


def rows_of(batches):
    return [batch.row_B.tolist() for batch in batches]


def module(log, **options):
    return RankingDataModule(log, **{"batch_size": 8, "window": 24, "seed": 3, **options})


def test_training_goes_on_from_the_position_in_the_checkpoint(array_log):
    whole = rows_of(module(array_log(100)).train_dataloader())
    first = module(array_log(100))
    for _, batch in zip(range(5), first.train_dataloader(), strict=False):
        first.advance(batch)
    state = first.state_dict()
    assert state == {"position": 5}
    second = module(array_log(100))
    second.load_state_dict(state)
    assert rows_of(second.train_dataloader()) == whole[5:]


def test_a_run_knows_its_number_of_batches_wherever_it_stands(array_log):
    data = module(array_log(100))
    assert data.num_batches == 13
    data.advance()
    assert (data.position, data.num_batches) == (1, 13)


def test_skipping_moves_the_running_loader_and_the_position(array_log):
    whole = rows_of(module(array_log(100)).train_dataloader())
    data = module(array_log(100))
    got = []
    for batch in data.train_dataloader():
        got.append(batch.row_B.tolist())
        data.advance(batch)
        if batch.number == 3:
            data.skip(4)
            assert data.position == 8
    assert got == whole[:4] + whole[8:]
    assert data.position == 13
    data.skip(5)
    assert data.position == 13
    data.skip(-13)
    with pytest.raises(UserError, match="cannot go back 1 batches from batch 0"):
        data.skip(-1)


def test_the_hold_out_is_evaluated_in_part_on_the_way_and_whole_at_the_end(array_log):
    data = module(array_log(20, eval_rows=50), eval_batch_size=10, eval_max_rows=20)
    assert rows_of(data.val_dataloader()) == [list(range(20, 30)), list(range(40, 50))]
    assert [row for rows in rows_of(data.test_dataloader()) for row in rows] == list(range(20, 70))


def test_openings_are_given_when_asked_for(array_log):
    assert all(batch.opening is None for batch in module(array_log(40)).train_dataloader())
    batches = list(module(array_log(40), progressive=True).train_dataloader())
    assert [batch.opening is not None for batch in batches] == [True, False, False, True, False]


def test_a_factory_is_called_once_and_late(array_log):
    calls = []
    data = module(lambda: calls.append(1) or array_log(40))
    assert not calls
    assert data.num_batches == 5
    list(data.val_dataloader())
    assert calls == [1]


def test_the_training_loader_can_be_wrapped(array_log):
    data = module(array_log(40), wrap_training=lambda loader: map(len, loader))
    assert list(data.train_dataloader()) == [8] * 5


def test_batches_move_to_the_device(array_log):
    data = module(array_log(40))
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, "meta", 0)
    assert moved.dense_BF.device.type == moved.ragged["tags"].values.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
        ({"eval_max_rows": -1}, "eval_max_rows must be at least 1"),
        ({"num_workers": -1}, "num_workers must be 0 or more"),
        ({"window": "6 weeks"}, "window must be a number of rows"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_read(array_log, options, message):
    with pytest.raises(UserError, match=message):
        module(array_log(40), **options)


class Seen(pl.LightningModule):
    """Records the rows it is trained on, advances the data module, and saves a checkpoint after one of the batches."""

    def __init__(self, *, save_after=None, path=None) -> None:
        super().__init__()
        self.save_after, self.path = save_after, path
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[list[int]] = []

    def training_step(self, batch):
        self.rows.append(batch.row_B.tolist())
        self.trainer.datamodule.advance(batch)
        return self.weight * batch.dense_BF.mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch.number == self.save_after:
            self.trainer.save_checkpoint(self.path)

    def validation_step(self, batch):
        assert len(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(data, seen, *, checkpoint=None):
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        val_check_interval=4,
        num_sanity_val_steps=0,
    )
    trainer.fit(seen, datamodule=data, ckpt_path=checkpoint, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::UserWarning")  # Lightning's own
@pytest.mark.parametrize("number", [2, 3, 6])
def test_a_lightning_run_goes_on_in_the_middle_of_a_window(array_log, tmp_path, number):
    whole = rows_of(module(array_log(100)).train_dataloader())
    first, second = Seen(save_after=number, path=tmp_path / "c.ckpt"), Seen()
    fit(module(array_log(100)), first)
    fit(module(array_log(100)), second, checkpoint=tmp_path / "c.ckpt")
    assert first.rows == whole
    assert second.rows == whole[number + 1 :]
