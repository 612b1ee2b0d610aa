"""A tiny run without Lightning, with or without a planted cause of divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from optim import build_optimizer
from ranker.data.batch import Batch, Ragged
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.losses import MultitaskLoss
from ranker.metrics import StreamingAUC
from ranker.models import SharedBottom
from ranker.replay.engine import Engine, Settings

ROWS = 64
SCHEMA = Schema(
    name="tiny",
    time_column="t",
    dense=tuple(DenseFeature(name=f"x{i}") for i in range(6)),
    categorical=(
        CategoricalFeature(name="user", num_embeddings=20, embedding_dim=4),
        CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=10, embedding_dim=4),
    ),
    tasks=(Task(name="click"), Task(name="watch", type="regression")),
)


class Toy:
    """A module that an engine can train, without Lightning."""

    def __init__(self, optim: str = "adagrad", *, lr: float = 0.1, hidden: tuple[int, ...] = (16, 16)) -> None:
        torch.manual_seed(0)
        self.schema = SCHEMA
        self.net = SharedBottom(SCHEMA, hidden=list(hidden))
        self.loss = MultitaskLoss(SCHEMA)
        self.train_auc = StreamingAUC(SCHEMA)
        self._optim, self._lr = optim, lr

    def configure_optimizers(self):
        if self._optim == "sgd":
            return torch.optim.SGD(self.net.parameters(), lr=self._lr)
        return build_optimizer(self._optim, self.net, lr=self._lr, embedding={"method": "adagrad"})


def make_batch(number: int, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(rows, 6, generator=generator)
    score = x[:, 0] - x[:, 1]
    click = (torch.rand(rows, generator=generator) < torch.sigmoid(2 * score)).float()
    lengths = torch.randint(0, 3, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Batch(
        dense_BF=x,
        onehot_BC=torch.randint(0, 21, (rows, 1), generator=generator),
        ragged={"tags": Ragged(torch.randint(0, 11, (int(offsets[-1]),), generator=generator), offsets)},
        labels_BT=torch.stack([click, score + torch.randn(rows, generator=generator)], 1),
        mask_BT=torch.ones(rows, 2, dtype=torch.bool),
        time_ms_B=torch.arange(rows) + number * rows,
        row_B=torch.arange(rows) + number * rows,
        window=0,
        number=number,
    )


def planted(batch: Batch, rows: list[int], column: int, value: float = 1e3) -> Batch:
    """The batch with an outlier of one dense feature in a few rows."""
    dense_BF = batch.dense_BF.clone()
    dense_BF[rows, column] = value
    return replace(batch, dense_BF=dense_BF)


@pytest.fixture
def engine() -> Callable[..., Engine]:
    def make(optim: str = "adagrad", **options) -> Engine:
        return Engine(Toy(optim, **options), Settings(detector={}))

    return make
