"""The preconditioner of SGD, Adam and Adagrad predicts where training diverges; optimizers that report steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optim import build_optimizer
from ranker.stability import ReportsSteps, adaptation, measure_sharpness, step_preconditioner


def quadratic(w: torch.Tensor) -> torch.Tensor:
    return 0.5 * (torch.tensor([20.0, 1.0], dtype=w.dtype) * w**2).sum()


def ratio(optimizer: torch.optim.Optimizer, w: torch.Tensor, **given: Any) -> float:
    step = step_preconditioner(optimizer, [w], **given)
    return measure_sharpness(quadratic(w), step.parameters, lr=step.lr, preconditioner=step.diagonals).ratio


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_gradient_descent_grows_exactly_where_the_ratio_is_above_1(settings: dict[str, Any], factor: float) -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    lr = factor * 0.1 / ratio(torch.optim.SGD([w], lr=0.1, **settings), w)
    optimizer = torch.optim.SGD([w], lr=lr, **settings)
    assert ratio(optimizer, w) == pytest.approx(factor)
    for _ in range(500):
        optimizer.zero_grad()
        quadratic(w).backward()
        optimizer.step()
    assert bool(w.detach().norm() > 10) is (factor > 1)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_adam_with_v_held_grows_exactly_where_the_ratio_is_above_1(factor: float) -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=1.0, betas=(0.9, 0.99))
    quadratic(w).backward()
    optimizer.step()
    lr = factor / ratio(optimizer, w)
    root = (optimizer.state[w]["exp_avg_sq"] / (1 - 0.99)).sqrt() + 1e-8
    x, m = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(1000):
        m = 0.9 * m + 0.1 * torch.tensor([20.0, 1.0]) * x
        x = x - lr * m / root
    assert bool(x.norm() > 10) is (factor > 1)
    assert step_preconditioner(optimizer, [w]).kind == "adam"


def test_sigma_and_the_rates_of_groups_scale_the_steps_and_what_stands_still_is_left_out() -> None:
    a, b, still, frozen = (torch.ones(1, requires_grad=True) for _ in range(4))
    groups = [
        {"params": [a, still], "lr": torch.tensor(0.1)},
        {"params": [b], "lr": 0.3},
        {"params": [frozen], "lr": 0.0},
    ]
    optimizer = torch.optim.Adagrad(groups, initial_accumulator_value=4.0, eps=0.0)
    found = step_preconditioner(optimizer, [a, b, still, frozen], sigma={a: 0.5, still: 0.0})
    assert [p is q for p, q in zip(found.parameters, [a, b], strict=True)] == [True, True]
    assert [float(d) for d in found.diagonals] == [pytest.approx(0.25), pytest.approx(1.5)]
    assert (found.lr, found.kind) == (pytest.approx(0.1), "adagrad")


def test_different_updates_are_each_taken_for_what_they_are() -> None:
    w, fresh = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = torch.optim.Adam([w, fresh], lr=0.1)
    w.grad = torch.ones(1)
    optimizer.step()
    assert step_preconditioner(optimizer, [w, fresh]).kind == "adam + gradient descent"
    plain = step_preconditioner(torch.optim.SGD([w], lr=0.1), [w])
    assert plain.is_identity
    assert not step_preconditioner(torch.optim.SGD([w], lr=0.1, momentum=0.9), [w]).is_identity


def test_our_optimizers_report_their_steps_and_torchs_do_not() -> None:
    net = torch.nn.Linear(2, 1)
    assert isinstance(build_optimizer("clippy", net, lr=0.1), ReportsSteps)
    assert not isinstance(torch.optim.Adagrad(net.parameters(), lr=0.1), ReportsSteps)


def test_a_coordinate_has_adapted_once_its_accumulator_is_above_twice_its_start() -> None:
    a, b = (torch.zeros(4, requires_grad=True) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "initial_accumulator_value": 1e-4}]
    optimizer = build_optimizer("adagrad", groups, lr=0.1, initial_accumulator_value=0.1)
    a.grad = torch.tensor([0.3, 0.33, 1.0, torch.nan])  # 0.09, 0.1089 and 1 against G_0 = 0.1
    b.grad = torch.tensor([0.0, 0.009, 0.0, 0.5])
    optimizer.step()
    found = adaptation(optimizer, [a])
    assert found is not None
    assert (float(found.share), found.start) == (0.5, 0.1)
    both = adaptation(optimizer, [a, b, torch.zeros(3)])
    assert both is not None
    assert (float(both.share), both.start) == (3 / 8, 1e-4)


def test_only_adagrads_accumulators_adapt() -> None:
    w = torch.ones(2, requires_grad=True)
    w.grad = torch.ones(2)
    for optimizer in (torch.optim.Adam([w], lr=0.1), torch.optim.SGD([w], lr=0.1)):
        optimizer.step()
        assert adaptation(optimizer, [w]) is None
    assert adaptation(torch.optim.Adagrad([torch.ones(2)], lr=0.1), []) is None
