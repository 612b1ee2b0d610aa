"""A generated log: seeded, in time order, of any length, and as hard to train on as a production log.

Users and items have latent factors. Popularity follows Zipf's law. Dense features are heavy-tailed. Factors and task
weights drift. New items arrive. Sometimes the scale of a feature jumps. The paper names these causes of divergence
(features with a changing distribution, many tasks on shared layers). Here they are strong enough to have an effect
within a few hundred steps.

Source: Tang et al., KDD 2023 (arXiv 2302.09178), sections 1 and 3. The generator is this project's.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranker.data.batch import Batch, Ragged
from ranker.data.log import Log
from ranker.data.schema import CategoricalFeature, DenseFeature, GroupColumn, Schema, Task
from ranker.data.synthetic_world import (
    AUTHOR_SHARE,
    CATEGORIES,
    HISTORY,
    POSITIVE_RATES,
    SEGMENTS,
    SURFACES,
    TAGS,
    Block,
    Difficulty,
    World,
)
from ranker.errors import UserError

BLOCK = 8_192  # rows generated together
DAY_MS = 86_400_000
START_MS = 1_767_225_600_000  # 2026-01-01 00:00 UTC


def synthetic_schema(
    *, num_users: int, num_items: int, signals: int, embedding_dim: int, weighted: bool = False
) -> Schema:
    """The schema of the stream, before any selection of tasks or features.

    Args:
        num_users: number of users.
        num_items: number of items alive at a time. Ids share twice as many embedding rows, so that a new item reuses
            the row of an item that is long gone.
        signals: number of dense signals besides the named features. Every other one is raw, the rest use log1p.
        embedding_dim: D of every categorical feature.
        weighted: whether rows have a weight.
    """
    sizes = {
        "author_id": num_items // AUTHOR_SHARE + 1,
        "category": CATEGORIES,
        "segment": SEGMENTS,
        "surface": SURFACES,
        "hour": 24,
    }
    categorical = [
        CategoricalFeature(name="user_id", num_embeddings=num_users, embedding_dim=embedding_dim),
        CategoricalFeature(name="item_id", hash_buckets=2 * num_items, embedding_dim=embedding_dim),
        *(CategoricalFeature(name=n, num_embeddings=s, embedding_dim=embedding_dim) for n, s in sizes.items()),
        CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=TAGS, embedding_dim=embedding_dim),
        CategoricalFeature(
            name="history", kind="sequence", table="item_id", max_length=HISTORY, embedding_dim=embedding_dim
        ),
    ]
    dense = [
        DenseFeature(name="user_activity", transform="log1p"),
        DenseFeature(name="user_tenure_days", scale=1e-3),
        DenseFeature(name="item_age_days", transform="log1p"),
        *(DenseFeature(name=f"signal_{f:02d}", transform="none" if f % 2 == 0 else "log1p") for f in range(signals)),
    ]
    tasks = [
        *(Task(name=name) for name in POSITIVE_RATES),
        Task(name="rating", type="regression", mask="rating_observed"),
        Task(name="watch_time", type="regression", transform="log1p"),
    ]
    return Schema(
        name="synthetic",
        time_column="time_ms",
        dense=tuple(dense),
        categorical=tuple(categorical),
        tasks=tuple(tasks),
        weight="row_weight" if weighted else "",
        groups=(GroupColumn(name="user", column="user_id"),),
    )


class SyntheticLog(Log):
    """A log whose rows are generated when they are read.

    Row i depends only on the arguments and on i. The training days come first, each with rows_per_day rows spread
    evenly. The hold-out is the whole day after the last training day. A log that begins on a later day has the rows,
    times and hold-out that the whole stream has from there on; only their positions count from 0.

    Args:
        seed: seed of the world and of every row.
        num_users: number of users.
        num_items: number of items alive at a time.
        first_day: days of the stream that are left out at its start.
        train_rows: number of training rows.
        eval_rows: rows of the last day.
        rows_per_day: rows of a training day. It determines how fast the stream drifts from row to row.
        signals: number of dense signals besides the named features.
        embedding_dim: D of every categorical feature.
        difficulty: what makes the stream hard.
        row_weights: spread s of the weights of the rows, exp(s z) of a normal z. 0: rows have no weight.
        schema: a selection of tasks and features (``Schema.select``). None for all. The rows are the same.

    Raises:
        UserError: a number is out of range.
    """

    schema: Schema

    def __init__(
        self,
        *,
        seed: int = 0,
        num_users: int = 20_000,
        num_items: int = 10_000,
        first_day: int = 0,
        train_rows: int = 400_000,
        eval_rows: int = 50_000,
        rows_per_day: int = 50_000,
        signals: int = 24,
        embedding_dim: int = 8,
        difficulty: Difficulty | None = None,
        row_weights: float = 0.0,
        schema: Schema | None = None,
    ) -> None:
        least = {"seed": 0, "num_users": 1, "num_items": 20, "first_day": 0}
        least |= dict.fromkeys(("train_rows", "eval_rows", "rows_per_day"), 1)
        given = locals()
        for name, minimum in least.items():
            if given[name] < minimum:
                raise UserError(f"synthetic log: {name} must be at least {minimum}, got {given[name]}")
        if not 0 <= row_weights <= 5:
            raise UserError(f"synthetic log: row_weights must be between 0 (none) and 5, got {row_weights}")
        self._seed, self._row_weights = seed, row_weights
        self._train_rows, self._eval_rows, self._rows_per_day = train_rows, eval_rows, rows_per_day
        self._start_ms, self._first_row = START_MS + first_day * DAY_MS, first_day * rows_per_day
        self._eval_start_ms = self._start_ms + -(-train_rows // rows_per_day) * DAY_MS
        self.schema = schema or synthetic_schema(
            num_users=num_users,
            num_items=num_items,
            signals=signals,
            embedding_dim=embedding_dim,
            weighted=row_weights > 0,
        )
        self._world = World(
            seed=seed,
            num_users=num_users,
            num_items=num_items,
            signals=signals,
            difficulty=difficulty or Difficulty(),
        )
        # Reads seldom end at the end of a block. The last block is cached for the start of the next read.
        self._last: tuple[int, Schema, Batch] | None = None

    @property
    def train_rows(self) -> int:
        """Number of training rows."""
        return self._train_rows

    @property
    def num_rows(self) -> int:
        """Number of all rows."""
        return self._train_rows + self._eval_rows

    def time_at_row(self, row: int) -> int:
        """Time of a row (Unix milliseconds)."""
        return int(self._times(np.asarray([row], dtype=np.int64))[0])

    def row_at_time(self, time_ms: int) -> int:
        """Position of the first row at or after a time (Unix milliseconds). num_rows if there is none."""
        if time_ms > self.time_at_row(self._train_rows - 1):
            position = -(-(time_ms - self._eval_start_ms) * self._eval_rows // DAY_MS)
            return self._train_rows + min(max(position, 0), self._eval_rows)
        return max(-(-(time_ms - self._start_ms) * self._rows_per_day // DAY_MS), 0)

    def read(self, start: int, stop: int) -> Batch:
        """Rows start .. stop-1 in time order.

        Raises:
            UserError: the range is not within the log.
        """
        if not 0 <= start < stop <= self.num_rows:
            raise UserError(f"synthetic log: rows {start} to {stop} are not within 0 to {self.num_rows}")
        parts = []
        start, stop = start + self._first_row, stop + self._first_row  # as the whole stream counts
        for number in range(start // BLOCK, (stop - 1) // BLOCK + 1):
            first = number * BLOCK
            part = self._block(number)
            parts.append(part.slice(max(start - first, 0), min(stop - first, BLOCK)))
        return Batch.concat(parts)

    def raw(self, start: int) -> tuple[NDArray[np.int64], Block]:
        """Times and raw columns of some rows, before transforms and hashing: what a file of the log holds.

        Args:
            start: first row. The last one is where its block ends, or the log.
        """
        number, first = divmod(start + self._first_row, BLOCK)
        _, time_B, block = self._drawn(number)
        rows = slice(first, first + min(BLOCK - first, self.num_rows - start))
        return time_B[rows], block.rows(rows)

    def _times(self, row_B: NDArray[np.int64]) -> NDArray[np.int64]:
        train = self._start_ms + row_B * DAY_MS // self._rows_per_day
        held_out = self._eval_start_ms + (row_B - self._train_rows) * DAY_MS // self._eval_rows
        return np.where(row_B < self._train_rows, train, held_out)

    def _block(self, number: int) -> Batch:
        # Several threads may read: each uses the tuple that it found, even if another thread replaces it.
        last = self._last
        if last is None or last[0] != number or last[1] is not self.schema:
            last = self._last = (number, self.schema, self._generate(number))
        return last[2]

    def _drawn(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Block]:
        """Positions in this log, times and raw columns of a block of the whole stream."""
        row_B = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.int64) - self._first_row
        time_B = self._times(row_B)
        return row_B, time_B, self._world.block(number, (time_B - START_MS) / DAY_MS)

    def _generate(self, number: int) -> Batch:
        row_B, time_B, block = self._drawn(number)
        weight_B = None
        if self._row_weights:  # from draws of their own, so that all other columns stay as they are
            draws = np.random.Generator(np.random.SFC64([self._seed, 3, number]))
            weight_B = torch.from_numpy(np.exp(self._row_weights * draws.standard_normal(BLOCK, dtype=np.float32)))
        return _batch(
            self.schema, block, row_B=torch.from_numpy(row_B), time_B=torch.from_numpy(time_B), weight_B=weight_B
        )


def _batch(schema: Schema, block: Block, *, row_B: Tensor, time_B: Tensor, weight_B: Tensor | None) -> Batch:
    """Converts raw columns to a batch: applies transforms and maps ids to embedding rows."""
    rows = len(row_B)
    dense = [_transform(block.dense[f.column], f.scale, f.transform) for f in schema.dense]
    onehot = [_embedding_rows(block.one_hot[f.column], schema.table_of(f)) for f in schema.one_hot]
    ragged = {}
    for feature in schema.ragged:
        values, offsets = block.ragged[feature.column]
        ragged[feature.name] = Ragged(_embedding_rows(values, schema.table_of(feature)), torch.from_numpy(offsets))
    mask_BT = torch.ones(rows, len(schema.tasks), dtype=torch.bool)
    labels_BT = torch.empty(rows, len(schema.tasks))
    for t, task in enumerate(schema.tasks):
        labels_BT[:, t] = _transform(block.labels[task.column], task.scale, task.transform)
        if task.mask:
            mask_BT[:, t] = torch.from_numpy(block.rating_observed)
    keys = [torch.from_numpy(block.one_hot[group.column]) for group in schema.groups]
    groups_BG = torch.stack(keys, dim=1) if keys else None
    return Batch(
        dense_BF=torch.stack(dense, dim=1) if dense else torch.empty(rows, 0),
        onehot_BC=torch.stack(onehot, dim=1) if onehot else torch.empty(rows, 0, dtype=torch.int64),
        ragged=ragged,
        labels_BT=labels_BT * mask_BT,
        mask_BT=mask_BT,
        time_ms_B=time_B,
        row_B=row_B,
        weight_B=weight_B,
        groups_BG=groups_BG,
    )


def _transform(values: NDArray[np.float32], scale: float, transform: str) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)) * scale
    return torch.sign(x) * torch.log1p(x.abs()) if transform == "log1p" else x


def _embedding_rows(ids: NDArray[np.int64], table: CategoricalFeature) -> Tensor:
    # Ids are consecutive, so the remainder alone spreads them evenly over the buckets.
    return torch.from_numpy(ids % table.hash_buckets if table.hash_buckets else ids) + 1
