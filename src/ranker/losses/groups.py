"""Rows of a batch by group. Shapes depend on the number of rows alone, so that nothing waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.data.batch import NO_GROUP


class Groups(NamedTuple):
    """The groups of a batch's rows. A row without a key (``NO_GROUP``) is a group of its own.

    Attributes:
        of_B: int64 [B], number of each row's group, from 0. There are at most B groups.
    """

    of_B: Tensor

    @classmethod
    def of(cls, keys_B: Tensor) -> Groups:
        """Numbers the groups of some rows.

        Args:
            keys_B: int64 [B], key of each row.
        """
        keys_B, order_B = keys_B.sort(stable=True)
        new_B = torch.ones_like(keys_B, dtype=torch.bool)
        new_B[1:] = (keys_B[1:] != keys_B[:-1]) | (keys_B[1:] == NO_GROUP)
        numbers_B = new_B.cumsum(0) - 1
        return cls(torch.empty_like(order_B).index_put((order_B,), numbers_B))

    def sums(self, values_B: Tensor) -> Tensor:
        """Sum of a value over each group, [B]; 0 where there is no group of this number."""
        return torch.zeros_like(values_B).index_add(0, self.of_B, values_B)

    def log_sum_exp(self, z_B: Tensor, weight_B: Tensor, counted_B: Tensor) -> Tensor:
        """Log sum over the counted rows j of a row's group of w_j exp(z_j), for each row, [B].

        Any finite value for a row of a group without counted rows.
        """
        low_B = torch.where(counted_B, z_B.detach(), -torch.inf)
        top_B = torch.full_like(low_B, -torch.inf).scatter_reduce(0, self.of_B, low_B, "amax")
        top_B = torch.where(top_B == -torch.inf, 0.0, top_B).index_select(0, self.of_B)
        # Differences of rows that do not count are replaced first: exp may overflow, and 0 * inf is nan.
        apart_B = torch.where(counted_B, z_B - top_B, 0.0)
        sum_B = self.sums(torch.where(counted_B, weight_B * apart_B.exp(), 0.0)).index_select(0, self.of_B)
        return top_B + torch.where(sum_B == 0, 1.0, sum_B).log()
