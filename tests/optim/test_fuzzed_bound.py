"""Clippy's bound holds whatever the sizes of weights, gradients and accumulators: 40 orders of magnitude, mixed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import optim

BACKENDS = ["native", "eager"]
LARGEST = torch.finfo(torch.float32).max


def scaled(size: int, generator: torch.Generator, rng: random.Random) -> torch.Tensor:
    """Normal numbers at one scale, with a few coordinates at other scales."""
    values = torch.randn(size, generator=generator, dtype=torch.float64) * 10 ** rng.uniform(-20, 20)
    for _ in range(rng.randrange(4)):
        begin = rng.randrange(size)
        end = min(size, begin + rng.choice([1, 1, 40, 1000]))
        values[begin:end] = torch.randn(end - begin, generator=generator, dtype=torch.float64)
        values[begin:end] *= 10 ** rng.uniform(-20, 20)
    return values.clamp(-LARGEST, LARGEST)


def draw(seed: int) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Settings, weight, gradient and G of one case."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size = rng.choice([5, 700, 3000, 70_000])
    given = {
        "lr": 10 ** rng.uniform(-3, 1),
        "lambda_rel": rng.choice([0.0, 0.1, 0.5]),
        "lambda_abs": rng.choice([0.0, 1e-7, 1e-2, 10.0]),
        "lambda_acc": rng.choice([0.0, 0.0, 0.1]),
        "preset": rng.choice(["paper", "tfrs"]),
        "accumulator": rng.choice(["current", "delayed"]),
        "eps": rng.choice([1e-10, 1e-7]),
    }
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    weight = scaled(size, generator, rng) if rng.random() < 0.7 else torch.zeros(size, dtype=torch.float64)
    total = scaled(size, generator, rng).abs()
    return given, weight.to(dtype), scaled(size, generator, rng).to(dtype), total.to(dtype)


def bound(given: dict[str, Any], weight: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """b of methods/clippy.py in float64. The inputs were rounded to the parameter's dtype before."""
    weight, grad, total = weight.double(), grad.double(), total.double()
    base = total if given["accumulator"] == "delayed" else total + grad.square()
    root = (base + given["eps"]).sqrt() if given["preset"] == "tfrs" else base.sqrt() + given["eps"]
    return given["lambda_rel"] * weight.abs() + given["lambda_abs"] + given["lambda_acc"] / root


def exceeded(seed: int, backend: str) -> str | None:
    """Take one step of one case. Return what is wrong with it, or None."""
    given, weight, grad, total = draw(seed)
    param = torch.nn.Parameter(weight.clone())
    optimizer = optim.build_optimizer("clippy", [("w", param)], backend=backend, collect_stats=True, **given)
    optimizer.state[param]["sum"] = total.clone()
    param.grad = grad
    optimizer.step()
    limit = bound(given, weight, grad, total)
    info = torch.finfo(weight.dtype)
    # The weight itself is rounded, before and after. Below the smallest normal number a dtype has no precision.
    allowed = limit * (1 + 64 * info.eps) + 2 * info.eps * weight.double().abs() + 4 * info.tiny
    moved = (param.detach().double() - weight.double()).abs()
    worst = (moved / allowed).max().item()
    return None if worst <= 1 else f"{worst} times the bound: {seed}, {given}"


def exceeded_on_adam(seed: int, backend: str) -> str | None:
    """The same on Adam, whose moments are drawn."""
    given, weight, grad, second = draw(seed)
    given = {key: given[key] for key in ("lr", "lambda_rel", "lambda_abs", "eps")}
    param = torch.nn.Parameter(weight.clone())
    optimizer = optim.build_optimizer("clippy_adam", [("w", param)], backend=backend, collect_stats=True, **given)
    other = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    first = scaled(weight.numel(), other[1], other[0]).to(weight.dtype)
    optimizer.state[param] |= {"step": torch.tensor(2.0), "exp_avg": first, "exp_avg_sq": second.clone()}
    param.grad = grad
    optimizer.step()
    info = torch.finfo(weight.dtype)
    limit = given["lambda_rel"] * weight.double().abs() + given["lambda_abs"]
    allowed = limit * (1 + 64 * info.eps) + 2 * info.eps * weight.double().abs() + 4 * info.tiny
    moved = (param.detach().double() - weight.double()).abs()
    worst = (moved / allowed).max().item()
    return None if worst <= 1 else f"{worst} times the bound: {seed}, {given}"


Check = Callable[[int, str], str | None]
CHECKS = [exceeded, exceeded_on_adam]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_holds_at_every_scale(backend: str, check: Check) -> None:
    wrong = [found for seed in range(20) if (found := check(seed, backend))]
    assert not wrong, wrong[:3]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_holds_at_every_scale_at_length(backend: str, check: Check, part: int) -> None:
    wrong = [found for seed in range(1000 * part, 1000 * part + 1000) if (found := check(seed, backend))]
    assert not wrong, (len(wrong), wrong[:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("first", "second"), [(1e12, 1e18), (1e18, 1e12), (3e19, 1e15)])
def test_an_overshoot_whose_square_overflows_hides_no_other(first: float, second: float, backend: str) -> None:
    """The first gradient makes the overshoot to exceed so large that its square is infinite in float32."""
    param = torch.nn.Parameter(torch.zeros(4 * 512))
    optimizer = optim.build_optimizer("clippy", [param], lr=0.1, preset="tfrs", backend=backend)
    param.grad = torch.zeros(4 * 512)
    param.grad[0], param.grad[3 * 512 + 200] = first, second  # in different blocks
    optimizer.step()
    assert param.abs().max() <= 1e-7 * (1 + 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_accumulator_that_vanishes_beside_its_gradient_breaks_no_bound(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(2048))
    given = {"lr": 0.1, "accumulator": "delayed", "eps": 0.0, "initial_accumulator_value": 1.0}
    optimizer = optim.build_optimizer("clippy", [param], backend=backend, **given)
    optimizer.state[param]["sum"] = torch.full((2048,), 1.0)
    optimizer.state[param]["sum"][1024:] = 1e-24
    param.grad = torch.full((2048,), 1e3)
    param.grad[0] = 1e20
    optimizer.step()
    assert param.abs().max() <= 1e-2 * (1 + 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_relative_bound_alone_tiny_weights_keep_it(backend: str) -> None:
    weight = torch.randn(70_000) * 1e-21
    param = torch.nn.Parameter(weight.clone())
    optimizer = optim.build_optimizer("clippy", [param], lr=0.1, lambda_abs=0.0, backend=backend)
    param.grad = torch.randn(70_000)
    optimizer.step()
    assert ((param.detach() - weight).abs() <= 0.5 * weight.abs() * (1 + 1e-5)).all()
