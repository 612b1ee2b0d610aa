"""The C kernels of Adam's family against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import optim
from optim.local_params import CHUNK
from optim.native.backend import NATIVE

NAMES = ["clippy_adam", "clippy_adamw", "lamb_adam"]
SHAPES = ((CHUNK + 701,), (17, 3), (), (0,))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"lr": torch.tensor(0.3)},
    {"lr": 1e-3},
    {"betas": (0.0, 0.5)},
    {"on_nonfinite": "skip"},
]


def run(name: str, backend: str, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]
    optimizer = optim.build_optimizer(name, params, **{"lr": 0.3, "collect_stats": True, "backend": backend, **given})
    for step in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=dtype) * (1000 if step == 1 else 1)
        assert all(NATIVE.takes(local) for local in optimizer.gather())
        optimizer.step()
    states = [value for param in params for key, value in optimizer.state[param].items() if key != "clip_stats"]
    return [param.detach() for param in params] + states, optimizer.clip_stats()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_kernels_agree_with_plain_torch(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    (mine, report), (theirs, expected) = (run(name, backend, dtype, options) for backend in ("native", "eager"))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for key, row in report.items():
        for field, value in row.items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert expected[key][field] == same, (key, field)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("place", [0, 511, 512, CHUNK - 1, CHUNK, CHUNK + 700])
def test_the_maximum_is_found_wherever_it_lies(place: int, backend: str) -> None:
    weight = nn.Parameter(torch.ones(CHUNK + 701))
    with torch.no_grad():
        weight[place] = 0.0
    optimizer = optim.build_optimizer("clippy_adam", [("w", weight)], lr=1.0, collect_stats=True, backend=backend)
    weight.grad = torch.ones(CHUNK + 701)  # r is 1 everywhere at the first step
    optimizer.step()
    row = optimizer.clip_stats()["w"]
    assert (row["coordinate"], row["term"]) == (place, "absolute")
    assert row["sigma"] == pytest.approx(1e-2, rel=1e-5)
    assert weight[place].item() == pytest.approx(-1e-2, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_passes_through_or_is_skipped_as_in_plain_torch(name: str, bad: float) -> None:
    for policy in ("propagate", "skip"):
        results = []
        for backend in ("native", "eager"):
            param = nn.Parameter(torch.ones(CHUNK + 5))
            optimizer = optim.build_optimizer(name, [param], lr=0.1, backend=backend, on_nonfinite=policy)
            param.grad = torch.ones(CHUNK + 5)
            param.grad[CHUNK + 1] = bad
            optimizer.step()
            results.append(param.detach())
            count = 0 if policy == "skip" else 1
            assert optimizer.state[param]["step"] == count
        assert results[0].isnan().equal(results[1].isnan())
        assert results[0].isnan().any().item() is (policy == "propagate")


@pytest.mark.parametrize("name", NAMES)
def test_touched_rows_are_stepped_as_in_plain_torch(name: str) -> None:
    results = []
    for backend in ("native", "eager"):
        torch.manual_seed(1)
        table = nn.Embedding(50, 6, sparse=True)
        optimizer = optim.build_optimizer(name, table, lr=0.1, backend=backend, weight_decay=0.0)
        for step in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 1, 4 + step, 49])).square().sum().backward()
            optimizer.step()
        results.append([table.weight.detach(), *optimizer.state[table.weight].values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert results[0][1] == 3


def test_a_step_is_the_same_to_the_bit_for_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append([run(name, "native", torch.float32, {})[0] for name in NAMES])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
