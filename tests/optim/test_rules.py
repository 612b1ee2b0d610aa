"""Every rule against its equation, written out independently, and in the limits where it does nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import optim
from optim.tensor_group import choose_sigma, make_groups

BACKENDS = ["eager", "auto"]
LR, G0 = 0.3, 0.1
ABLATIONS = ["clippy_norm2", "clippy_gradient", "clippy_gradient_norm2"]


def adagrad_direction(grad: torch.Tensor) -> torch.Tensor:
    return grad / (G0 + grad**2).sqrt()


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    weight, grad = torch.randn(7, 5, dtype=request.param), torch.randn(7, 5, dtype=request.param)
    grad[2, 3] = 0.0
    return weight, grad


def assert_step(after: torch.Tensor, weight: torch.Tensor, sigma: Any, direction: torch.Tensor) -> None:
    torch.testing.assert_close(after, weight - LR * sigma * direction, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gc_scales_by_lambda_over_the_gradients_norm(pair: Any, step_once: Any, backend: str) -> None:
    weight, grad = pair
    after, optimizer = step_once("gc", weight, grad, lr=LR, clip_norm=0.2, backend=backend)
    assert_step(after, weight, 0.2 / grad.norm(), adagrad_direction(grad))
    torch.testing.assert_close(next(iter(optimizer.state.values()))["sum"], G0 + grad**2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agc_by_tensor_scales_by_the_ratio_of_norms(pair: Any, step_once: Any, backend: str) -> None:
    weight, grad = pair
    after, _ = step_once("agc", weight, grad, lr=LR, clip_factor=0.05, backend=backend)
    assert_step(after, weight, 0.05 * weight.norm() / grad.norm(), adagrad_direction(grad))


def test_agc_by_unit_takes_the_norms_over_the_inputs_of_each_output(pair: Any, step_once: Any) -> None:
    weight, grad = pair
    grad[4] *= 1e-3  # one unit below the bound: it alone is not clipped
    after, _ = step_once("agc", weight, grad, lr=LR, clip_factor=0.05, by="unit")
    ratio = 0.05 * weight.norm(dim=1, keepdim=True) / grad.norm(dim=1, keepdim=True)
    assert ratio[4] > 1
    assert_step(after, weight, ratio.clamp(max=1), adagrad_direction(grad))


@pytest.mark.parametrize("shape", [(6,), ()])
def test_agc_by_unit_takes_biases_and_scalars_whole(shape: tuple[int, ...], step_once: Any) -> None:
    weight, grad = torch.randn(shape), torch.randn(shape)
    after, _ = step_once("agc", weight, grad, lr=LR, clip_factor=0.05, by="unit")
    assert_step(after, weight, 0.05 * weight.norm() / grad.norm(), adagrad_direction(grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lamb_moves_a_tensor_by_a_fraction_of_its_norm(pair: Any, step_once: Any, backend: str) -> None:
    weight, grad = pair
    direction = adagrad_direction(grad)
    after, _ = step_once("lamb", weight, grad, lr=LR, trust_coefficient=0.02, backend=backend)
    assert_step(after, weight, 0.02 * weight.norm() / direction.norm(), direction)
    torch.testing.assert_close((after - weight).norm(), LR * 0.02 * weight.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clippy_is_algorithm_1(pair: Any, step_once: Any, backend: str) -> None:
    weight, grad = pair
    direction = adagrad_direction(grad)
    bound = 0.5 * weight.abs() + 1e-2
    after, _ = step_once("clippy", weight, grad, lr=LR, backend=backend)
    moved = direction != 0
    assert_step(after, weight, (bound / (LR * direction.abs()))[moved].min().clamp(max=1), direction)


def test_clippys_third_term_adds_the_inverse_root_of_the_accumulator(pair: Any, step_once: Any) -> None:
    weight, grad = pair
    direction = adagrad_direction(grad)
    bound = 0.5 * weight.abs() + 1e-2 + 0.05 * (G0 + grad**2) ** -0.5
    after, _ = step_once("clippy", weight, grad, lr=LR, lambda_acc=0.05)
    assert_step(after, weight, (bound / (LR * direction.abs()))[direction != 0].min().clamp(max=1), direction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ABLATIONS)
def test_the_ablations_change_clippys_norm_and_what_it_bounds(
    pair: Any, step_once: Any, name: str, backend: str
) -> None:
    weight, grad = pair
    direction = adagrad_direction(grad)
    bound = 0.05 * weight.abs() + 1e-3
    sigma = {
        "clippy_norm2": bound.norm() / (LR * direction.norm()),
        "clippy_gradient": (bound / grad.abs())[grad != 0].min(),
        "clippy_gradient_norm2": bound.norm() / grad.norm(),
    }[name]
    assert sigma < 1
    after, _ = step_once(name, weight, grad, lr=LR, lambda_rel=0.05, lambda_abs=1e-3, backend=backend)
    assert_step(after, weight, sigma, direction)


def test_clippy_sgd_bounds_the_plain_gradient(pair: Any, step_once: Any) -> None:
    weight, grad = pair
    after, _ = step_once("clippy_sgd", weight, grad, lr=LR)
    sigma = ((0.5 * weight.abs() + 1e-2) / (LR * grad.abs()))[grad != 0].min().clamp(max=1)
    assert_step(after, weight, sigma, grad)


@pytest.mark.parametrize(("name", "reference"), [("clippy_adam", "Adam"), ("clippy_adamw", "AdamW")])
def test_clippy_on_adam_with_a_wide_bound_is_torchs_adam(name: str, reference: str) -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    import optim

    decay = {"weight_decay": 0.05}
    first = optim.build_optimizer(name, [ours], lr=0.01, lambda_abs=1e6, **decay)
    second = getattr(torch.optim, reference)([theirs], lr=0.01, **decay)
    for _ in range(5):
        ours.grad = torch.randn(3, 4)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs)


def test_lamb_on_adam_is_adams_direction_at_the_weights_norm(pair: Any, step_once: Any) -> None:
    weight, grad = pair
    after, _ = step_once("lamb_adam", weight, grad, lr=LR)
    direction = grad / (grad.abs() + 1e-6)
    assert_step(after, weight, weight.norm() / direction.norm(), direction)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("gc", {"clip_norm": 1e9}),
        ("agc", {"clip_factor": 1e9}),
        ("agc", {"clip_factor": 1e9, "by": "unit"}),
        ("clippy", {"lambda_abs": 1e9}),
        ("clippy", {"lambda_rel": 1e9, "lr": 1e-3}),
        *((name, {"lambda_abs": 1e9}) for name in ABLATIONS),
    ],
)
def test_a_wide_bound_leaves_adagrad(pair: Any, step_once: Any, name: str, limit: dict[str, Any]) -> None:
    weight, grad = pair
    given = {"lr": LR, **limit}
    torch.testing.assert_close(
        step_once(name, weight, grad, **given)[0], step_once("adagrad", weight, grad, lr=given["lr"])[0]
    )


@pytest.mark.parametrize("name", ["gc", "agc", "clippy", *ABLATIONS])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_clipping_never_amplifies(pair: Any, step_once: Any, name: str, scale: float) -> None:
    weight, grad = pair
    plain = step_once("adagrad", weight, grad * scale, lr=LR)[0] - weight
    clipped = step_once(name, weight, grad * scale, lr=LR)[0] - weight
    assert (clipped.abs() <= plain.abs() * (1 + 1e-5) + 1e-7).all()


@pytest.mark.parametrize("name", ["gc", "agc"])
def test_clipped_accumulation_is_gradient_clipping_before_torchs_adagrad(pair: Any, name: str) -> None:
    import optim

    weight, _ = pair
    ours, theirs = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    given = {"clip_norm": 0.2} if name == "gc" else {"clip_factor": 0.03}
    first = optim.build_optimizer(name, [ours], lr=LR, clip_accumulator=True, **given)
    second = torch.optim.Adagrad([theirs], lr=LR, initial_accumulator_value=G0)
    for _ in range(4):
        ours.grad = torch.randn_like(weight)
        theirs.grad = ours.grad.clone()
        limit = 0.2 if name == "gc" else 0.03 * float(theirs.detach().norm())
        torch.nn.utils.clip_grad_norm_([theirs], limit)
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gc", "agc", "lamb", "clippy", *ABLATIONS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_zero_moves_nothing(step_once: Any, name: str, backend: str) -> None:
    weight = torch.randn(3, 4)
    assert step_once(name, weight, torch.zeros(3, 4), lr=LR, backend=backend)[0].equal(weight)


@pytest.mark.parametrize("name", ["gc", "agc", "lamb", "clippy", *ABLATIONS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_zero_can_move(step_once: Any, name: str, backend: str) -> None:
    after, _ = step_once(name, torch.zeros(3, 4), torch.ones(3, 4), lr=LR, backend=backend)
    assert (after < 0).all()


def test_agc_without_a_floor_holds_zeros_still_as_the_papers_formula_does(step_once: Any) -> None:
    after, _ = step_once("agc", torch.zeros(3), torch.ones(3), lr=LR, min_norm=0.0)
    assert after.equal(torch.zeros(3))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("size", [100, 70_000])
@pytest.mark.parametrize("scale", [1e19, 1e17, 1e-21, 1e-25])
def test_lamb_takes_norms_whose_squares_leave_the_range_of_float32(scale: float, size: int, backend: str) -> None:
    param = torch.nn.Parameter(torch.full((size,), scale))
    given = {"lr": 0.1, "eps": 1e-30, "initial_accumulator_value": 0.0, "backend": backend, "collect_stats": True}
    optimizer = optim.build_optimizer("lamb", [("w", param)], **given)
    param.grad = torch.ones(size)  # so r is 1 everywhere
    optimizer.step()
    assert optimizer.clip_stats()["w"]["sigma"] == pytest.approx(1e-2 * scale, rel=1e-3)


def test_a_norm_per_unit_is_exact_where_units_differ_by_forty_orders() -> None:
    param = torch.nn.Parameter(torch.tensor([[1e19, 1e19], [1e-21, 1e-21], [1.0, 1.0]]))
    optimizer = optim.build_optimizer("agc", [param], lr=0.1, by="unit", min_norm=0.0)
    param.grad = param.detach().clone()
    (local,) = optimizer.gather()
    (group,) = make_groups([local], optimizer.backends)
    choose_sigma(group)
    assert group.sigma is not None
    torch.testing.assert_close(group.sigma.flatten(), torch.full((3,), 1e-2))


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_lamb_adam_is_algorithm_2_of_its_paper(weight_decay: float, maximize: bool, backend: str) -> None:
    """You et al., ICLR 2020, with phi the identity; the same as timm's Lamb without its gradient clipping."""
    beta1, beta2, eps, lr = 0.9, 0.999, 1e-6, 0.02
    x = torch.randn(6, 5, dtype=torch.float64)
    param = torch.nn.Parameter(x.clone())
    given = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "maximize": maximize, "backend": backend}
    optimizer = optim.build_optimizer("lamb_adam", [param], **given)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(1, 4):
        grad = torch.randn(6, 5, dtype=torch.float64)
        param.grad = -grad if maximize else grad
        optimizer.step()
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        joined = r + weight_decay * x
        x = x - lr * x.norm() / joined.norm() * joined
        torch.testing.assert_close(param.detach(), x, rtol=1e-12, atol=1e-12)
