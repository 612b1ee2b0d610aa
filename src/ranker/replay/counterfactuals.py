"""Counterfactual batches (features or rows removed), and searches for a small set of causes with few questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ranker.data.batch import Batch, Ragged
from ranker.data.row_faults import drop_rows
from ranker.data.schema import Schema

Edit = Callable[[Batch], Batch]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DenseStatistics:
    """Usual values of the dense features, from batches that did not cause the divergence.

    Attributes:
        median_F: median per feature.
        max_deviation_F: largest absolute distance from the median per feature; at least 1e-6.
    """

    median_F: Tensor
    max_deviation_F: Tensor

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> DenseStatistics:
        """Statistics over all rows of some batches."""
        values_NF = torch.cat([batch.dense_BF for batch in batches])
        values_NF = torch.where(values_NF.isfinite(), values_NF, torch.nan)
        median_F = values_NF.nanmedian(0).values.nan_to_num(0.0)
        max_deviation_F = (values_NF - median_F).abs().nan_to_num(0.0).amax(0)
        return cls(median_F=median_F, max_deviation_F=max_deviation_F.clamp(min=1e-6))

    def relative_deviation_BF(self, batch: Batch) -> Tensor:  # noqa: N802
        """Distance of each value from the median, relative to the largest one; infinite if it is not finite."""
        deviation_BF = ((batch.dense_BF - self.median_F) / self.max_deviation_F).abs()
        return torch.where(batch.dense_BF.isfinite(), deviation_BF, torch.inf)


def without_features(schema: Schema, usual: DenseStatistics, names: Collection[str]) -> Edit:
    """Removes features: a dense feature becomes its median, an id the unknown id, a list an empty list."""
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
    """Removes rows without moving other rows: their labels are masked and their features become null.

    Args:
        rows: positions of the rows to remove, by ``share_key`` of the share that they are in.
    """

    def edit(batch: Batch) -> Batch:
        positions = sorted(rows.get(share_key(batch), ()))
        return drop_rows(batch, np.array(positions, dtype=np.int64)) if positions else batch

    return edit


def share_key(batch: Batch) -> int:
    """Identifies the share of a rank in a batch, by the row id of its first row; the shares hold different rows."""
    return int(batch.row_B[0]) if len(batch) else -1


def find_sufficient_subset(items: Sequence[T], is_sufficient: Callable[[Sequence[T]], bool]) -> list[T]:
    """A small sufficient subset of the items, by halving; empty where neither half of the items is sufficient.

    The first item is tried by itself before anything else, so a good order saves questions. If neither half of a
    sufficient subset is sufficient, both are needed and the search ends. All items together are not tried. At most
    ``max_questions(len(items))`` questions.

    Args:
        items: items, most suspicious first.
        is_sufficient: whether a subset is sufficient.
    """
    rest, found = list(items), []
    if rest and is_sufficient(rest[:1]):
        return rest[:1]
    while len(rest) > 1:
        middle = (len(rest) + 1) // 2
        half = next((part for part in (rest[:middle], rest[middle:]) if is_sufficient(part)), None)
        if half is None:
            break
        rest = found = half
    return found


def find_sufficient_prefix(size: int, is_sufficient: Callable[[int], bool]) -> int | None:
    """The smallest k up to ``size`` such that the first k items are sufficient; None where all of them are not.

    Doubles k until it is sufficient, then bisects. It assumes that more items are sufficient where fewer are. At most
    ``max_questions(size)`` questions.
    """
    low, high = 0, 1  # the first low items are not sufficient
    while not is_sufficient(high):
        if high >= size:
            return None
        low, high = high, min(2 * high, size)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_sufficient(middle) else (middle, high)
    return high


def max_questions(items: int) -> int:
    """Upper bound on the number of questions of either search."""
    return 1 + 2 * math.ceil(math.log2(items)) if items > 1 else 1
