"""Gradient clipping of dense and sparse gradients together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ranker.training.training_step import clip_gradients

DENSE, ROWS = torch.tensor([3.0, -4.0]), torch.tensor([[6.0], [2.0], [6.0]])  # rows 0 and 2 are the same one


def parameters(*, sparse: bool) -> list[nn.Parameter]:
    first, table, idle = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(5, 1)), nn.Parameter(torch.zeros(1))
    first.grad = DENSE.clone()
    table.grad = torch.sparse_coo_tensor([[1, 3, 1]], ROWS.clone(), (5, 1), check_invariants=True)
    if not sparse:
        table.grad = table.grad.to_dense()
    return [first, table, idle]


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("bound", [1.0, 5.0, 100.0])
def test_sparse_gradients_are_clipped_as_the_dense_ones_they_stand_for(bound: float, by_value: bool) -> None:
    dense, sparse = parameters(sparse=False), parameters(sparse=True)

    clip_gradients(dense, bound, by_value=by_value)
    clip_gradients(iter(sparse), bound, by_value=by_value)

    norm = (25 + 12**2 + 4) ** 0.5
    expected = DENSE.clamp(-bound, bound) if by_value else DENSE * min(1.0, bound / (norm + 1e-6))
    torch.testing.assert_close(dense[0].grad, expected)
    assert torch.equal(sparse[0].grad, dense[0].grad)
    assert torch.equal(sparse[1].grad.to_dense(), dense[1].grad)
    assert sparse[1].grad.is_sparse
