"""Properties of Clippy that hold for any tensors (hypothesis)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optim

NUMBERS = st.one_of(st.just(0.0), st.floats(1e-4, 1e4), st.floats(-1e4, -1e-4))
PAIRS = st.integers(1, 12).flatmap(
    lambda size: st.tuples(*(st.lists(NUMBERS, min_size=size, max_size=size) for _ in range(2)))
)
BOUNDS = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-4, 1e2),
        "lambda_rel": st.one_of(st.just(0.0), st.floats(1e-3, 1.0)),
        "lambda_abs": st.one_of(st.just(0.0), st.floats(1e-7, 1.0)),
        "lambda_acc": st.one_of(st.just(0.0), st.floats(1e-3, 1.0)),
        "accumulator": st.sampled_from(["current", "delayed"]),
        "preset": st.sampled_from(["paper", "tfrs"]),
        "backend": st.sampled_from(["eager", "auto"]),
    }
)
# The first example may compile the C kernels.
CHECKED = settings(max_examples=60, deadline=None, derandomize=True)


def step(numbers: Any, config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return bound, eta * r, the weight's change and sigma of one step in float64."""
    weight, grad = (torch.tensor(values, dtype=torch.float64) for values in numbers)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad
    optimizer = optim.build_optimizer("clippy", [("w", parameter)], collect_stats=True, **config)
    (group,) = optimizer.param_groups
    optimizer.step()
    total = group["initial_accumulator_value"] + (grad**2 if config["accumulator"] == "current" else 0)
    inside = config["preset"] == "tfrs"
    scale = 1 / (total + group["eps"]) ** 0.5 if inside else 1 / (total**0.5 + group["eps"])
    scale = scale * torch.ones_like(weight)
    bound = group["lambda_rel"] * weight.abs() + group["lambda_abs"] + group["lambda_acc"] * scale
    row = optim.stats.read(optimizer.param_groups, optimizer.state)["w"]
    return bound, group["lr"] * grad * scale, parameter.detach() - weight, row["sigma"]


@CHECKED
@given(PAIRS, BOUNDS)
def test_no_coordinate_moves_more_than_its_bound(numbers: Any, config: dict[str, Any]) -> None:
    bound, _, change, _ = step(numbers, config)
    weight = torch.tensor(numbers[0], dtype=torch.float64).abs()
    assert (change.abs() <= bound * (1 + 1e-9) + 1e-15 * weight).all()


@CHECKED
@given(PAIRS, BOUNDS)
def test_sigma_is_the_largest_that_keeps_the_bound(numbers: Any, config: dict[str, Any]) -> None:
    bound, full, _, sigma = step(numbers, config)
    assert (sigma * full.abs() <= bound * (1 + 1e-9)).all()
    if sigma < 1:
        raised = (sigma + 1e-300) * (1 + 1e-3) * full.abs()
        assert (raised > bound).any()


@CHECKED
@given(PAIRS, BOUNDS, st.floats(0.1, 10.0))
def test_scaling_a_tensor_and_its_bound_scales_the_step(numbers: Any, config: dict[str, Any], scale: float) -> None:
    # w -> c w, lambda_abs -> c lambda_abs, lambda_acc -> c lambda_acc, eta -> c eta: sigma stays, the step is c times.
    _, _, change, sigma = step(numbers, config)
    scaled = {**config, **{name: config[name] * scale for name in ("lr", "lambda_abs", "lambda_acc")}}
    weights = [value * scale for value in numbers[0]]
    _, _, change_scaled, sigma_scaled = step((weights, numbers[1]), scaled)
    assert sigma_scaled == pytest.approx(sigma, rel=1e-9, abs=1e-300)
    rounding = 1e-13 * max(abs(value) for value in weights) + 1e-300
    torch.testing.assert_close(change_scaled, scale * change, rtol=1e-6, atol=rounding)


@CHECKED
@given(PAIRS)
def test_no_step_clips_while_the_learning_rate_is_below_lambda_abs(numbers: Any) -> None:
    *_, sigma = step(
        numbers, {"lr": 1e-2, "accumulator": "current", "preset": "paper", "backend": "eager", "lambda_abs": 1e-2}
    )
    assert sigma == 1


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_where_only_the_bound_is_zero_nothing_moves_and_where_both_are_zero_nothing_limits(
    step_once: Any, backend: str
) -> None:
    given_ = {"lr": 0.5, "lambda_abs": 0.0, "backend": backend}
    after, _ = step_once("clippy", torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), **given_)
    assert after.equal(torch.tensor([0.0, 1.0]))
    after, _ = step_once("clippy", torch.tensor([0.0, 9.0]), torch.tensor([0.0, 1e-3]), **given_)
    assert after[0] == 0
    assert after[1] < 9


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("accumulator", ["current", "delayed"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_learning_rate_of_0_moves_nothing_even_where_the_bound_is_0(
    backend: str, accumulator: str, tensor_lr: bool
) -> None:
    """A warm-up may begin at 0, and b_i = 0 gives an overshoot of infinity: their product would be NaN."""
    weight = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    lr = torch.tensor(0.0) if tensor_lr else 0.0
    optimizer = optim.build_optimizer(
        "clippy", [weight], lr=lr, lambda_abs=0.0, accumulator=accumulator, backend=backend
    )
    weight.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    assert weight.tolist() == [0.0, 1.0]
