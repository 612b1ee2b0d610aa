from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ranker.stability import layer_signs, task_gradients


def test_norms_by_layer_are_those_computed_by_hand() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    w.grad = torch.tensor([0.6, -0.8])
    optimizer = torch.optim.Adagrad([w], lr=0.1, initial_accumulator_value=0.1, eps=0.0)
    signs = layer_signs([("w", w)], optimizer)["w"]
    assert float(signs.grad_norm) == pytest.approx(1.0)
    assert float(signs.grad_over_weight) == pytest.approx(0.2)
    assert float(signs.update_max) == pytest.approx(0.8 / math.sqrt(0.1 + 0.64))


def test_update_max_is_what_the_next_step_moves_by() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    optimizer = torch.optim.Adagrad(net.parameters(), lr=0.05, initial_accumulator_value=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(16, 4)).square().mean().backward()
        signs = layer_signs(net.named_parameters(), optimizer)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer.step()
        for name, p in net.named_parameters():
            moved = (p.detach() - before[name]).abs().max() / 0.05
            assert float(signs[name].update_max) == pytest.approx(float(moved), rel=1e-4)


def test_parameters_without_dense_gradients_are_left_out_and_other_optimizers_have_no_update() -> None:
    table, w, idle = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    (table(torch.tensor([1])) * w).sum().backward()
    named = [("table", table.weight), ("w", w), ("idle", idle)]
    signs = layer_signs(named, torch.optim.SGD([w], lr=0.1))
    assert list(signs) == ["w"]
    assert math.isnan(float(signs["w"].update_max))
    assert math.isnan(float(layer_signs(named)["w"].update_max))


def test_task_gradients_give_norms_and_cosines_and_leave_the_graph_and_grad_alone() -> None:
    shared = nn.Parameter(torch.tensor([1.0, 1.0]))
    losses = [3 * shared[0], -2 * shared[0], 5 * shared[1], shared.sum() * 0.0]
    got = task_gradients(losses, [shared])
    assert got.norm_T.tolist() == [3.0, 2.0, 5.0, 0.0]
    assert got.cosine_TT[:3, :3].tolist() == [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert got.cosine_TT[3].isnan().all()
    assert shared.grad is None
    torch.stack(losses).sum().backward()
    assert shared.grad is not None


def test_a_task_that_does_not_reach_the_layer_pulls_with_nothing() -> None:
    shared, own = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    got = task_gradients([shared.sum(), own.sum()], [shared])
    assert got.norm_T.tolist() == [pytest.approx(2**0.5), 0.0]
