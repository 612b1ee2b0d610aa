"""With sigma = 1 the step is torch.optim.Adagrad's."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

import optim
from optim.native.backend import is_available

SHAPES = [(300, 301), (17,), ()]


def run(make: Any, steps: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]
    optimizer = make(params)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=dtype)
        optimizer.step()
    return [param.detach() for param in params] + [optimizer.state[param]["sum"] for param in params]


def theirs(params: Any, **given: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(params, lr=0.05, initial_accumulator_value=0.1, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}], ids=str)
def test_adagrad_in_plain_torch_is_torchs_fused_adagrad_to_the_bit(options: Any, dtype: torch.dtype) -> None:
    ours = run(lambda p: optim.build_optimizer("adagrad", p, lr=0.05, backend="eager", **options), dtype=dtype)
    for mine, other in zip(ours, run(lambda p: theirs(p, fused=True, **options), dtype=dtype), strict=True):
        assert mine.equal(other)


def test_clippy_that_cannot_clip_is_torchs_fused_adagrad_to_the_bit() -> None:
    ours = run(lambda p: optim.build_optimizer("clippy", p, lr=0.05, lambda_abs=0.05, backend="eager"))
    for mine, other in zip(ours, run(lambda p: theirs(p, fused=True)), strict=True):
        assert mine.equal(other)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", ["adagrad", "clippy", "gc"])
def test_with_sigma_one_every_path_is_adagrad_to_rounding(name: str, backend: str) -> None:
    given: dict[str, Any] = {"clippy": {"lambda_abs": 1e6}, "gc": {"clip_norm": 1e6}}.get(name, {})
    lr = torch.tensor(0.05)  # a tensor: nobody can tell in advance that nothing clips
    ours = run(lambda p: optim.build_optimizer(name, p, lr=lr, backend=backend, **given))
    for mine, other in zip(ours, run(lambda p: theirs(p, foreach=False)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gc", "agc", "lamb", "clippy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"clip_accumulator": True},
        {"preset": "tfrs"},
        {"preset": "tfrs", "lambda_acc": 0.1},
        {"accumulator": "delayed"},
        {"on_nonfinite": "skip"},
        {"collect_stats": True},
    ],
    ids=str,
)
def test_the_c_kernels_agree_with_plain_torch(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    known = {*optim.get_info(name).all_hyperparameters, "on_nonfinite", "collect_stats"}
    if not set(options) <= known:
        pytest.skip(f"{name} has no such hyperparameter")
    native, eager = (
        run(lambda p, backend=backend: optim.build_optimizer(name, p, lr=0.3, backend=backend, **options), dtype=dtype)
        for backend in ("auto", "eager")
    )
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for mine, other in zip(native, eager, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("weights", [1e-2, 1.0])
def test_what_the_kernels_skip_never_holds_the_maximum(scale: float, weights: float) -> None:
    # Most blocks are settled by their gradients alone; one wild coordinate in the last block must not be.
    weight, grad = torch.randn(200_000) * weights, torch.randn(200_000) * scale
    weight[199_990], grad[199_990] = 0.0, 30.0 * scale
    sigmas = []
    for backend in ("auto", "eager"):
        param = torch.nn.Parameter(weight.clone())
        param.grad = grad.clone()
        optimizer = optim.build_optimizer("clippy", [("w", param)], lr=1.0, collect_stats=True, backend=backend)
        optimizer.step()
        row = optimizer.clip_stats()["w"]
        assert row["coordinate"] == 199_990
        sigmas.append(row["sigma_min"])
    assert sigmas[0] == pytest.approx(sigmas[1], rel=1e-5)
    assert sigmas[0] < 1


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
def test_the_kernels_compile_where_there_is_a_compiler() -> None:
    assert is_available()


def test_an_accumulator_changed_from_outside_is_looked_at_again() -> None:
    # The kernels remember a lower bound of G; shrinking G from outside must not be missed.
    weight, grad = torch.zeros(100_000), torch.full((100_000,), 1e-5)
    grad[-1] = 1e-3  # overshoots ten times as far as the rest once G is tiny
    param = torch.nn.Parameter(weight.clone())
    param.grad = grad
    optimizer = optim.build_optimizer("clippy", [("w", param)], lr=0.5, collect_stats=True)
    optimizer.step()
    optimizer.state[param]["sum"].fill_(1e-8)
    with torch.no_grad():
        param.zero_()
    optimizer.step()
    assert (param.abs() <= 1e-2 * (1 + 1e-5)).all()
    loaded = {"state": {0: {**optimizer.state_dict()["state"][0], "sum": torch.full((100_000,), 1e-9)}}}
    optimizer.load_state_dict({**optimizer.state_dict(), **loaded})
    with torch.no_grad():
        param.zero_()
    optimizer.step()
    assert (param.abs() <= 1e-2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("wild", [1e25, 1e-25])
def test_lamb_agrees_where_a_gradient_squared_leaves_the_range_of_float32(wild: float) -> None:
    # The kernels take norm2(r)^2 as the sum of g^2 / G, which is inf / inf for a gradient whose square overflows.
    weight, grad = torch.randn(100_000), torch.randn(100_000)
    grad[70_000] = wild
    results = []
    for backend in ("auto", "eager"):
        param = torch.nn.Parameter(weight.clone())
        param.grad = grad.clone()
        optim.build_optimizer("lamb", [param], lr=0.5, backend=backend).step()
        results.append(param.detach())
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
