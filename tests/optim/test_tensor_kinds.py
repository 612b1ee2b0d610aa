"""Dtypes, shapes and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import optim
from optim.native.backend import NATIVE
from optim.updates import Adagrad

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


class Subclass(torch.Tensor):
    """A tensor whose memory the C kernels know nothing about."""


def lazily_negated(values: torch.Tensor) -> torch.Tensor:
    """The same values as a view whose memory holds their negatives."""
    view = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert view.is_neg()
    return view


KINDS = {
    "subclass": lambda grad: grad.as_subclass(Subclass),
    "negated": lazily_negated,
    "strided": lambda grad: torch.stack([grad, grad], dim=-1)[..., 0],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_c_kernels_leave_tensors_that_are_not_plain_memory_to_torch(name: str, kind: str) -> None:
    weight, grad = torch.randn(40, 3), torch.randn(40, 3)
    plain, other = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    plain.grad, other.grad = grad.clone(), KINDS[kind](grad)
    for param in (plain, other):
        optimizer = optim.build_optimizer(name, [param], lr=0.1)
        (local,) = optimizer.gather(keep_state=False)
        if param is other:
            assert not NATIVE.takes(local)
        optimizer.step()
    torch.testing.assert_close(plain.detach(), other.detach())


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_of_a_subclass_is_left_to_torch(name: str) -> None:
    weight, grad = torch.randn(40, 3), torch.randn(40, 3)
    plain, other = torch.nn.Parameter(weight.clone()), weight.clone().as_subclass(Subclass).requires_grad_()
    for param in (plain, other):
        param.grad = grad.clone()
        optim.build_optimizer(name, [param], lr=0.1, collect_stats=True).step()
    torch.testing.assert_close(plain.detach(), other.detach().as_subclass(torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_functional_tensors_step_as_plain_ones(name: str) -> None:
    weight, grad = torch.randn(40, 3), torch.randn(40, 3)

    def step(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        weight.grad = grad
        optimizer = optim.build_optimizer(name, [weight], lr=0.1)
        optimizer.step()
        return weight

    with torch.no_grad():
        functional = torch.func.functionalize(step)(weight.clone(), grad)
        torch.testing.assert_close(functional, step(weight.clone(), grad))


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_fake_tensors_on_the_cpu_are_traced_by_the_default_backend(name: str) -> None:
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(40, 3))
        param.grad = torch.ones(40, 3)
        optimizer = optim.build_optimizer(name, [param], lr=0.1, collect_stats=True, on_nonfinite="skip")
        optimizer.step()
        assert all(isinstance(value, FakeTensor) for value in optimizer.state[param].values())


def test_a_tensor_whose_memory_was_freed_is_left_to_torch() -> None:
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = optim.build_optimizer("clippy", [param], lr=0.1)
    param.untyped_storage().resize_(0)  # as FSDP1 does between two uses
    (local,) = optimizer.gather()
    assert not NATIVE.takes(local)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_default_device_is_not_where_helper_tensors_go(name: str, backend: str) -> None:
    params = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(70_000))]
    optimizer = optim.build_optimizer(name, params, lr=0.1, backend=backend, collect_stats=True, on_nonfinite="skip")
    for param in params:
        param.grad = torch.ones_like(param)
    with torch.device("meta"):
        optimizer.step()
        optim.what_if(optimizer, ["gc", "agc", "lamb", "clippy"])
        report = optimizer.clip_stats()
    assert all((param < 1).all() for param in params)
    assert report["parameter_1"]["steps"] == 1


def test_pieces_in_plain_torch_are_stepped_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads would wait for each other after every operation on a piece."""
    seen, direction = [], Adagrad.direction

    def watched(update: Adagrad, grad: torch.Tensor, *others: Any) -> Any:
        seen.append((grad.numel() > 100, torch.get_num_threads()))
        return direction(update, grad, *others)

    monkeypatch.setattr(Adagrad, "direction", watched)
    params = [torch.nn.Parameter(torch.ones(size)) for size in (200_001, 100)]
    for param in params:
        param.grad = torch.ones_like(param)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        optim.build_optimizer("clippy", params, lr=0.1, backend="eager", collect_stats=True).step()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {(True, 1), (False, 3)}
