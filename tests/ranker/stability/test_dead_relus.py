from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranker.models.mlp import MLP
from ranker.stability.early_signs import ReluPeaks, dead_share


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
