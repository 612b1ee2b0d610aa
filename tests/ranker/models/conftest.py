from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ranker.data.batch import Batch, Ragged
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def schema() -> Schema:
    """Two widths, one-hot and ragged features mixed, and a sequence that shares a table."""
    return Schema(
        name="toy",
        time_column="t",
        dense=(DenseFeature(name="x"), DenseFeature(name="y")),
        categorical=(
            CategoricalFeature(name="user", num_embeddings=4, embedding_dim=2),
            CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=3, embedding_dim=3),
            CategoricalFeature(name="item", hash_buckets=5, embedding_dim=3),
            CategoricalFeature(name="hour", vocabulary=("am", "pm"), embedding_dim=2),
            CategoricalFeature(name="seen", kind="sequence", table="item", embedding_dim=3),
            CategoricalFeature(name="city", num_embeddings=2, embedding_dim=2),
        ),
        tasks=(Task(name="click"), Task(name="watch", type="regression", weight=2.0), Task(name="like")),
    )


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Builds a seeded random batch for any schema."""

    def build(schema: Schema, rows: int, *, seed: int = 0) -> Batch:
        draw = torch.Generator().manual_seed(seed)

        def ids(feature: CategoricalFeature, count: int) -> torch.Tensor:
            return torch.randint(schema.table_of(feature).rows, (count,), generator=draw)

        ragged = {}
        for feature in schema.ragged:
            offsets = torch.zeros(rows + 1, dtype=torch.int64)
            offsets[1:] = torch.randint(0, 4, (rows,), generator=draw).cumsum(0)
            ragged[feature.name] = Ragged(ids(feature, int(offsets[-1])), offsets)
        one_hot = [ids(feature, rows) for feature in schema.one_hot]
        shape = (rows, len(schema.tasks))
        return Batch(
            dense_BF=torch.randn(rows, len(schema.dense), generator=draw),
            onehot_BC=torch.stack(one_hot, 1) if one_hot else torch.zeros(rows, 0, dtype=torch.int64),
            ragged=ragged,
            labels_BT=torch.randint(0, 2, shape, generator=draw).float(),
            mask_BT=torch.rand(shape, generator=draw) < 0.8,
            time_ms_B=torch.arange(rows),
            row_B=torch.arange(rows),
        )

    return build
