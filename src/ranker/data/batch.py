"""Batch and Ragged: the rows of a log as a few tensors, however many features. A window has the same type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLUMNS = ("dense_BF", "onehot_BC", "labels_BT", "mask_BT", "time_ms_B", "row_B")
OPTIONAL = ("weight_B", "groups_BG")  # None unless the schema has them
NO_GROUP = -(2**63)  # the key of a row whose group is null: it shares its group with no other row


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths without padding. List i is ``values[offsets[i] : offsets[i + 1]]``.

    Attributes:
        values: int64, shape [N].
        offsets: int64, shape [B + 1], from 0 to N.
    """

    values: Tensor
    offsets: Tensor

    def take(self, index_B: Tensor) -> Ragged:
        """The lists at the given positions, in that order. CPU only."""
        index = index_B.numpy()
        bounds = self.offsets.numpy()
        starts = bounds[index]
        lengths = bounds[index + 1] - starts
        offsets = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # Source position of each value: its list's start plus its position within the list.
        source = np.repeat(starts - offsets[:-1], lengths)
        source += np.arange(len(source))
        return Ragged(torch.from_numpy(self.values.numpy().take(source)), torch.from_numpy(offsets))

    @staticmethod
    def concat(parts: Sequence[Ragged]) -> Ragged:
        """Concatenates the lists of several parts. CPU only."""
        ends = torch.cumsum(torch.tensor([0, *(len(p.values) for p in parts)]), 0).tolist()
        offsets = [parts[0].offsets[:1], *(p.offsets[1:] + end for p, end in zip(parts, ends, strict=False))]
        return Ragged(joined([p.values for p in parts]), joined(offsets))


@dataclass(frozen=True)
class Batch:
    """Rows of a log in columns, as a model and a loss read them.

    Attributes:
        dense_BF: float32 [B, F], transformed dense features, in the schema's order.
        onehot_BC: int64 [B, C], embedding row of each one-hot feature within its own table, in the schema's order.
        ragged: embedding rows of each multi-hot or sequence feature, by name.
        labels_BT: float32 [B, T], transformed labels. 0 where not observed.
        mask_BT: bool [B, T], true where the label is observed.
        time_ms_B: int64 [B], Unix milliseconds, UTC.
        row_B: int64 [B], the schema's row_id, or the row's position in the log.
        weight_B: float32 [B], weight of each row, 0 or more. None: the schema has no weight, every row counts once.
            Rows of weight 0 have no observed label.
        groups_BG: int64 [B, G], key of each row's groups, in the schema's order: the integer itself, or a 64-bit hash
            of a string. NO_GROUP for null. None: the schema has no groups.
        window: number of the time window that the rows were drawn from. -1 outside of training.
        number: number of the batch in the training order, counted over all ranks and windows. -1 outside of training.
        opening: on the first batch of a window, this rank's whole share of the window in time order, so that the
            window can be scored before the model trains on it. None on all other batches.
    """

    dense_BF: Tensor
    onehot_BC: Tensor
    ragged: Mapping[str, Ragged]
    labels_BT: Tensor
    mask_BT: Tensor
    time_ms_B: Tensor
    row_B: Tensor
    weight_B: Tensor | None = None
    groups_BG: Tensor | None = None
    window: int = -1
    number: int = -1
    opening: Batch | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels_BT)

    def take(self, index_B: Tensor) -> Batch:
        """The rows at the given positions, in that order, without ``number`` and ``opening``. CPU only."""
        rows = self._each(lambda tensor: _take(tensor, index_B), lambda lists: lists.take(index_B))
        return replace(rows, number=-1, opening=None)

    def slice(self, start: int, stop: int) -> Batch:
        """Rows start .. stop-1, without ``number`` and ``opening``. Only the offsets of lists are copied."""

        def cut(lists: Ragged) -> Ragged:
            offsets = lists.offsets[start : stop + 1]
            low, high = int(offsets[0]), int(offsets[-1])
            return Ragged(lists.values[low:high], offsets - low)

        return replace(self._each(lambda tensor: tensor[start:stop], cut), number=-1, opening=None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same rows on another device. ``opening`` is not moved: it is moved in pieces when it is scored."""
        if self.dense_BF.device == torch.device(device):  # a tensor is moved in microseconds, but there are forty
            return self
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same rows in pinned memory, so that copies to a GPU are asynchronous. ``opening`` is not pinned."""
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return self._each(change, lambda lists: Ragged(change(lists.values), change(lists.offsets)))

    def _each(self, change: Callable[[Tensor], Tensor], change_lists: Callable[[Ragged], Ragged]) -> Batch:
        columns: dict[str, Any] = {name: change(tensor) for name, tensor in self.columns().items()}
        return replace(self, ragged={n: change_lists(lists) for n, lists in self.ragged.items()}, **columns)

    def columns(self) -> dict[str, Tensor]:
        """The tensors with one entry per row, by name. Those that are None are left out."""
        found = {name: getattr(self, name) for name in (*COLUMNS, *OPTIONAL)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @staticmethod
    def concat(parts: Sequence[Batch]) -> Batch:
        """Concatenates the rows of several parts. CPU only."""
        columns: dict[str, Any] = {name: joined([getattr(part, name) for part in parts]) for name in parts[0].columns()}
        ragged = {n: Ragged.concat([part.ragged[n] for part in parts]) for n in parts[0].ragged}
        return Batch(ragged=ragged, window=parts[0].window, **columns)


# NumPy copies whole rows in the calling thread. Torch would start a thread pool for each reading thread. All of these
# would compete with the training step for the cores: 2 to 20 times slower on a busy machine.


def joined(tensors: list[Tensor]) -> Tensor:
    """The tensors one after another."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.from_numpy(np.concatenate([tensor.numpy() for tensor in tensors]))


def _take(tensor: Tensor, index_B: Tensor) -> Tensor:
    return torch.from_numpy(tensor.numpy().take(index_B.numpy(), axis=0))
