"""A real Lightning trainer on a few small batches, for tests of callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger
from torch.utils.data import DataLoader

import optim
from ranker.data.synthetic import SyntheticLog
from ranker.models import SharedBottom
from ranker.training.module import RankingModule

ROWS = 64
LOG = SyntheticLog(train_rows=6 * ROWS, eval_rows=ROWS, num_users=50, num_items=20)
ADAGRAD_ON_TABLES = {"embedding": {"method": "adagrad"}, "collect_stats": True}


class Recorder(Logger):
    """Keeps what was recorded, by step."""

    name, version = "recorder", ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def trained(*callbacks: Callback, optimizer: Any = None, net: Any = None, **trainer: Any) -> tuple[Any, Recorder]:
    torch.manual_seed(0)
    net = net or SharedBottom(LOG.schema, hidden=[8, 4], cross_layers=1, cross_rank=2)
    optimizer = optimizer or partial(optim.build_optimizer, "clippy", **ADAGRAD_ON_TABLES)
    module = RankingModule(net, schema=LOG.schema, optimizer=optimizer, lr=0.1, log_every=3)
    recorder = Recorder()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = pl.Trainer(accelerator="cpu", max_epochs=1, logger=recorder, callbacks=list(callbacks), **quiet, **trainer)
    batches = [LOG.read(i * ROWS, (i + 1) * ROWS) for i in range(6)]
    with pytest.warns():  # Lightning recommends workers
        fit.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    return module, recorder
