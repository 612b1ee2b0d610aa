"""Early signs: norms per layer, gradients per task, activations, and dead ReLUs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranker.models.layers import MLP
from ranker.stability import early_signs
from ranker.stability.early_signs import (
    LayerActivations,
    ReluPeaks,
    dead_share,
    infinity_norm,
    layer_signs,
    task_gradients,
)


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


class Net(nn.Module):
    """An MLP over a layer of another kind, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.ModuleDict({"layers": nn.Linear(3, 3)})
        self.bottom = MLP(3, [4, 2])
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottom(self.cross["layers"](x))


ROLES = {"dcn": "cross.layers", "first": "bottom.layers.0", "top": "bottom.layers.1", "head": "head"}


def test_largest_activation_and_dead_share_are_those_of_the_forward_pass_by_role() -> None:
    net, x = Net(), torch.randn(64, 3)
    with torch.no_grad():
        net.bottom.layers[0].bias[:1] = -1e6
    watched = LayerActivations(net, ROLES)
    with watched.measuring():
        top = net(x)
    found = watched.compute()

    crossed = net.cross["layers"](x)
    first = torch.relu(net.bottom.layers[0](crossed))
    assert list(found) == ["first", "top", "dcn"], "a head that is joined into a product is not seen"
    assert found["first"].dead is not None
    assert float(found["first"].dead) >= 0.25
    for role, output in (("dcn", crossed), ("first", first), ("top", top)):
        assert torch.equal(found[role].largest, output.abs().max()), role
    assert found["dcn"].dead is None


def test_nothing_is_hooked_outside_of_a_measurement_and_nan_is_reported() -> None:
    net = Net()
    watched = LayerActivations(net, ROLES)
    with watched.measuring():
        net(torch.full((4, 3), math.nan))
    assert all(not module._forward_hooks for module in net.modules())
    found = watched.compute()
    assert all(math.isnan(float(each.largest)) for each in found.values())
    assert float(found["top"].dead) == 0.0  # type: ignore[arg-type]


def test_the_infinity_norm_equals_that_of_torch() -> None:
    for x in (torch.randn(3, 5), torch.tensor([-7.0, 2.0]), torch.tensor([1.0, math.nan])):
        torch.testing.assert_close(infinity_norm(x), torch.linalg.vector_norm(x, math.inf), equal_nan=True)


def test_over_ranks_the_largest_counts_and_nan_as_infinite(monkeypatch) -> None:
    other = torch.tensor([5.0, 0.0, 1.0])

    def all_reduce(row: Tensor, op: object) -> None:
        row.copy_(torch.maximum(row, other))

    ranks = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        all_reduce=all_reduce,
        ReduceOp=SimpleNamespace(MAX="max"),
    )
    monkeypatch.setattr(early_signs, "dist", ranks)
    joined = early_signs.max_over_ranks([torch.tensor([1.0, 2.0]), torch.tensor([math.nan])])
    assert [row.tolist() for row in joined] == [[5.0, 2.0], [math.inf]]


def measured(net: nn.Module, x: Tensor) -> dict[str, float]:
    relus = ReluPeaks(net)
    with relus.measuring():
        net(x)
    return {name: float(dead_share(peak_H)) for name, peak_H in relus.peaks.items()}


def test_the_share_of_dead_units_is_exact_by_layer() -> None:
    net = MLP(4, [8, 4])
    with torch.no_grad():
        net.layers[0].bias[:2] = -1e6  # 2 of 8 units never fire
        net.layers[1].bias[:] = -1e6
    shares = measured(net, torch.randn(256, 4))
    assert list(shares.values()) == [0.25, 1.0]


def test_modules_and_functions_count_alike_and_names_tell_the_caller() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
            self.second = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.second(F.relu(self.first(x))))

    assert list(measured(Net(), torch.randn(64, 3))) == ["first.1.0", "0", "1"]


def test_outside_of_a_measurement_nothing_is_hooked() -> None:
    net = MLP(3, [4])
    relus = ReluPeaks(net)
    with relus.measuring():
        net(torch.randn(8, 3))
    before = dict(relus.peaks)
    net(torch.full((8, 3), float("nan")))
    assert relus.peaks == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_an_exception_in_the_forward_pass_leaves_no_hook_behind() -> None:
    net = MLP(3, [4])
    try:
        with ReluPeaks(net).measuring():
            net(torch.randn(8, 99))
    except RuntimeError:
        pass
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_measuring_changes_neither_output_nor_gradient() -> None:
    net, x = MLP(3, [4, 4]), torch.randn(8, 3)
    plain = net(x)
    with ReluPeaks(net).measuring():
        seen = net(x)
    assert torch.equal(plain, seen)
    seen.sum().backward()
    assert net.layers[0].weight.grad is not None
