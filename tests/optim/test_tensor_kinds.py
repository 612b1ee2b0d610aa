"""Dtypes, shapes and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import optim

NAMES = ["adagrad", "gc", "agc", "lamb", "clippy", "clippy_adam", "clippy_sgd"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_keep_float32_state_and_follow_the_float32_step(name: str, dtype: torch.dtype) -> None:
    weight, grad = torch.randn(40, 3).to(dtype), torch.randn(40, 3).to(dtype)
    narrow, wide = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.float())
    narrow.grad, wide.grad = grad, grad.float()
    optimizers = [optim.build_optimizer(name, [param], lr=0.1) for param in (narrow, wide)]
    for optimizer in optimizers:
        optimizer.step()
    assert narrow.dtype == dtype
    assert narrow.equal(wide.to(dtype))
    for key, value in optimizers[0].state[narrow].items():
        assert value.dtype == torch.float32, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), ()], ids=str)
@pytest.mark.parametrize("extra", [{}, {"on_nonfinite": "skip", "collect_stats": True}], ids=["plain", "watched"])
def test_empty_and_0d_tensors_step(name: str, shape: tuple[int, ...], extra: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(5))]
    optimizer = optim.build_optimizer(name, params, lr=0.1, **extra)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(param.isfinite().all() and (param < 1).all() for param in params)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_unit", [False, True])
def test_non_contiguous_tensors_step_as_contiguous_ones(name: str, by_unit: bool) -> None:
    if by_unit and name != "agc":
        pytest.skip("only agc has units")
    weight, grad = torch.randn(6, 5), torch.randn(6, 5)
    strided = torch.nn.Parameter(torch.zeros(5, 6).t())
    with torch.no_grad():
        strided.copy_(weight)
    plain = torch.nn.Parameter(weight.clone())
    strided.grad = torch.zeros(6, 10)[:, ::2].copy_(grad)
    plain.grad = grad.clone()
    assert not strided.is_contiguous()
    extra = {"by": "unit"} if by_unit else {}
    for param in (strided, plain):
        optim.build_optimizer(name, [param], lr=0.1, collect_stats=True, **extra).step()
    torch.testing.assert_close(strided.detach(), plain.detach())


def test_large_tensors_are_cut_without_changing_the_result() -> None:
    weight, grad = torch.randn(150_001, dtype=torch.float64), torch.randn(150_001, dtype=torch.float64)
    cut = torch.nn.Parameter(weight.clone())
    whole = torch.nn.Parameter(weight.expand(2, -1).t().contiguous()[:, :1])  # not contiguous: stepped in one piece
    cut.grad, whole.grad = grad, grad[:, None].clone()
    for param in (cut, whole):
        optim.build_optimizer("clippy_adam", [param], lr=0.1).step()
    torch.testing.assert_close(cut.detach(), whole.detach()[:, 0], rtol=1e-12, atol=0)


def test_frozen_and_unused_parameters_are_left_alone() -> None:
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = optim.build_optimizer("clippy", [used, unused], lr=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert unused.equal(torch.ones(3))
    assert unused not in optimizer.state


def test_a_step_counts_as_an_in_place_change_for_autograd() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optim.build_optimizer("gc", [weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
