"""A small Parquet log with one window of broken rows, which make a run diverge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from support import TINY

BATCH, WINDOW = 64, 256  # rows; a window has 4 batches, drawn at random
BATCHES = 320
BAD = (60, 64)  # batches of the broken window: steps 61 to 64
BAD_ROWS = (BAD[0] * BATCH, BAD[1] * BATCH)
SCHEMA = """
name: broken
time_column: ts
dense:
- {name: price}
- {name: age}
categorical:
- {name: user, hash_buckets: 50, embedding_dim: 4}
- {name: item, num_embeddings: 20, embedding_dim: 4}
tasks:
- {name: click}
- {name: seconds, type: regression}
"""
SETTINGS = (
    *(override for override in TINY if not override.startswith("data.")),
    "data=parquet",
    "data.base_lr.laptop=0.1",
    f"data.window={WINDOW}",
    f"scale.batch_size={BATCH}",
    "train.eval_every=0",
    "train.checkpoint_every=0",
    "train.progressive=false",
    "callbacks.early_signs.every=0",
)
ROLLBACK = ("callbacks.rollback.tries=2", "callbacks.rollback.back_steps=5", "callbacks.rollback.skip_batches=20")
RING = ("callbacks.snapshots.every=5", "callbacks.snapshots.disk=6")


def write_log(root: Path, *, scale: float = 1e30) -> Path:
    """Writes two days, the second one for evaluation. In the broken window the price is multiplied by ``scale``.

    1e30 is finite, so the checks of the log accept it. Its square is infinite in float32, so all weights are nan after
    one batch.
    """
    root.mkdir(parents=True)
    (root / "schema.yaml").write_text(SCHEMA)
    draw = np.random.default_rng(0)
    for day, rows in enumerate((BATCHES * BATCH, 2048)):
        item = draw.integers(0, 20, rows)
        price = item / 10 + draw.normal(0, 0.3, rows)
        if day == 0:
            price[slice(*BAD_ROWS)] *= scale
        columns = {
            "ts": 1_699_920_000_000 + day * 86_400_000 + np.arange(rows) * 4_000,
            "price": price,
            "age": draw.normal(0, 1, rows),
            "user": draw.integers(0, 2**60, rows),
            "item": item,
            "click": (draw.random(rows) < 0.1 + item / 25).astype(np.int8),
            "seconds": item / 10 + draw.normal(0, 0.5, rows),
        }
        pl.DataFrame(columns).write_parquet(root / f"day=2023-11-{14 + day}.parquet")
    return root
