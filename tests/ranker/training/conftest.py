"""A real fit of a tiny model on the synthetic stream, with callbacks of the test's choice."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, Checkpoint

from optim import build_optimizer
from ranker.data.datamodule import RankingDataModule
from ranker.data.synthetic import SyntheticLog
from ranker.models import SharedBottom
from ranker.training.bookkeeping import Bookkeeping
from ranker.training.module import RankingModule
from ranker.training.stability_callback import DivergenceWatch, Stability


@pytest.fixture
def fit() -> Callable[..., pl.Trainer]:
    """Fits with Clippy and a warm-up on dense features normalised by past windows; 48 steps of 128 rows."""

    def call(
        callbacks: Sequence[Callback] = (),
        *,
        stability: Stability | None = None,
        num_workers: int = 1,
        sparse: bool = False,
        ckpt_path: str | None = None,
        ids: Mapping[str, float] | None = None,
        **trainer: Any,
    ) -> pl.Trainer:
        pl.seed_everything(0, verbose=False)
        log = SyntheticLog(
            train_rows=6144, eval_rows=1024, rows_per_day=2048, num_users=300, num_items=100, embedding_dim=4
        )
        if ids:  # rules for the rows of tables
            ruled = tuple(f if f.table else replace(f, **ids) for f in log.schema.categorical)
            log.schema = replace(log.schema, categorical=ruled)
        module = RankingModule(
            SharedBottom(log.schema, hidden=[16, 16], sparse_embeddings=sparse),
            schema=log.schema,
            optimizer=lambda model_or_params, lr: build_optimizer("clippy", model_or_params, lr=lr),
            lr=0.1,
            warmup_steps=30,
        )
        datamodule = RankingDataModule(
            log,
            batch_size=128,
            window=1024,
            num_workers=num_workers,
            progressive=True,
            dense_statistics="past_windows",
        )
        fitting = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Bookkeeping(), stability or Stability(divergence=DivergenceWatch()), *callbacks],
            **trainer,
        )
        fitting.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
        return fitting

    return call


@pytest.fixture
def disk_full_after() -> Callable[[int], AbstractContextManager[None]]:
    """Lets no file grow beyond some bytes, which fails as a full disk does: in the middle of a write."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, handler)

    return limited
