from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ranker.models.mlp import MLP
from ranker.stability import early_signs
from ranker.stability.early_signs import LayerActivations, infinity_norm


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


def test_nothing_is_hooked_outside_and_a_nan_shows() -> None:
    net = Net()
    watched = LayerActivations(net, ROLES)
    with watched.measuring():
        net(torch.full((4, 3), math.nan))
    assert all(not module._forward_hooks for module in net.modules())
    found = watched.compute()
    assert all(math.isnan(float(each.largest)) for each in found.values())
    assert float(found["top"].dead) == 0.0  # type: ignore[arg-type]


def test_the_infinity_norm_is_torchs() -> None:
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
