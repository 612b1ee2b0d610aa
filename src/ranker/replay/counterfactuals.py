"""Counterfactual batches: features at their usual value, rows left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ranker.data.batch import Batch, Ragged
from ranker.data.row_faults import drop_rows
from ranker.data.schema import Schema

Edit = Callable[[Batch], Batch]


@dataclass(frozen=True, kw_only=True)
class Usual:
    """What dense features usually are, from batches that are under no suspicion.

    Attributes:
        median_F: median of each.
        largest_F: largest absolute distance from the median; at least 1e-6.
    """

    median_F: Tensor
    largest_F: Tensor

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Usual:
        """Over all rows of some batches."""
        values_NF = torch.cat([batch.dense_BF for batch in batches])
        values_NF = torch.where(values_NF.isfinite(), values_NF, torch.nan)
        median_F = values_NF.nanmedian(0).values.nan_to_num(0.0)
        largest_F = (values_NF - median_F).abs().nan_to_num(0.0).amax(0)
        return cls(median_F=median_F, largest_F=largest_F.clamp(min=1e-6))

    def distance_BF(self, batch: Batch) -> Tensor:  # noqa: N802
        """How far each value lies from the median: 1 is as far as any before, infinite where it is not finite."""
        distance_BF = ((batch.dense_BF - self.median_F) / self.largest_F).abs()
        return torch.where(batch.dense_BF.isfinite(), distance_BF, torch.inf)


def without_features(schema: Schema, usual: Usual, names: Collection[str]) -> Edit:
    """Takes features out: a dense one is its median in every row, an id the one for unknown, a list empty."""
    dense = [i for i, feature in enumerate(schema.dense) if feature.name in names]
    one_hot = [i for i, feature in enumerate(schema.one_hot) if feature.name in names]
    ragged = [feature.name for feature in schema.ragged if feature.name in names]

    def edit(batch: Batch) -> Batch:
        dense_BF, onehot_BC, lists = batch.dense_BF.clone(), batch.onehot_BC.clone(), dict(batch.ragged)
        dense_BF[:, dense] = usual.median_F[dense]
        onehot_BC[:, one_hot] = 0
        for name in ragged:
            lists[name] = Ragged(lists[name].values[:0], torch.zeros_like(lists[name].offsets))
        return replace(batch, dense_BF=dense_BF, onehot_BC=onehot_BC, ragged=lists)

    return edit


def without_rows(rows: Mapping[int, Collection[int]]) -> Edit:
    """Takes rows out without moving any other: no task counts them, their features read as null.

    Args:
        rows: by ``Batch.row_B`` of the first row of a share (which tells the ranks' shares apart), places of rows.
    """

    def edit(batch: Batch) -> Batch:
        places = sorted(rows.get(share_key(batch), ()))
        return drop_rows(batch, np.array(places, dtype=np.int64)) if places else batch

    return edit


def share_key(batch: Batch) -> int:
    """Tells the shares of one batch apart, which hold different rows of the log."""
    return int(batch.row_B[0]) if len(batch) else -1
