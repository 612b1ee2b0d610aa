from __future__ import annotations

import pytest
import torch

from ranker.models.lookup import by_bag, by_gather


@pytest.mark.parametrize("dim", [2, 3, 8, 10])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("lists", [[[4, 4, 0], [], [2], []], [[]], []])
def test_the_lookup_for_a_cpu_equals_torchs_own_kernels(lists, rows, sparse, dim):
    weight = torch.randn(6, dim)
    rows_BC = torch.tensor([[0, 5], [5, 1], [2, 2]])[:rows]
    values = torch.tensor([row for part in lists for row in part], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(part) for part in lists)]).cumsum(0)
    results = []
    for look_up in (by_bag, by_gather):
        leaf = weight.clone().requires_grad_()
        one_hot, bags = look_up(leaf, rows_BC, values, offsets, sparse=sparse)
        (one_hot.square().sum() + bags.square().sum()).backward()
        assert leaf.grad.is_sparse == sparse
        results.append((one_hot, bags, leaf.grad.to_dense()))
    assert results[1][1].shape == (len(lists), dim)
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want)


def test_rows_and_means_by_hand():
    weight = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    values, offsets = torch.tensor([1, 2, 0]), torch.tensor([0, 2, 2, 3])
    for look_up in (by_bag, by_gather):
        one_hot, bags = look_up(weight, torch.tensor([[2], [0]]), values, offsets, sparse=False)
        torch.testing.assert_close(one_hot, torch.tensor([[[4.0, 40.0]], [[1.0, 10.0]]]))
        torch.testing.assert_close(bags, torch.tensor([[3.0, 30.0], [0.0, 0.0], [1.0, 10.0]]))


def test_the_lookup_for_a_cpu_has_second_derivatives():
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    rows_BC, values, offsets = torch.tensor([[0, 5], [5, 1]]), torch.tensor([4, 4, 0, 2]), torch.tensor([0, 3, 3, 4])

    def squares(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(found.square() for found in by_gather(weight, rows_BC, values, offsets, sparse=False))

    assert torch.autograd.gradcheck(squares, weight)
    assert torch.autograd.gradgradcheck(squares, weight)


def test_the_gradient_of_a_single_row_may_begin_anywhere_in_memory():
    """A batch of one row: what joins its embeddings behind three dense features gives gradients at an odd offset."""
    weight, joining = torch.randn(6, 8), torch.randn(27, 1)
    gradients = []
    for look_up in (by_bag, by_gather):
        leaf = weight.clone().requires_grad_()
        one_hot, bags = look_up(leaf, torch.tensor([[0, 5]]), torch.tensor([1]), torch.tensor([0, 1]), sparse=False)
        (torch.cat([torch.ones(1, 3), one_hot.view(1, 16), bags.view(1, 8)], dim=1) @ joining).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
