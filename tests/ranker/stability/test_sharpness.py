"""Sharpness equals the exact largest eigenvalue, and the edge is where gradient descent diverges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ranker.errors import UserError
from ranker.models.layers import MLP
from ranker.stability import measure_sharpness, step_preconditioner
from ranker.stability.sharpness import hessian_product, largest_eigenvalue


class Problem:
    """A small net with two tasks, and its exact Hessian."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(MLP(5, [8, 6]), nn.Linear(6, 2)).to(dtype)
        self.x, self.y = torch.randn(64, 5, dtype=dtype), torch.rand(64, 2, dtype=dtype).round()
        self.parameters = list(self.net.parameters())

    def loss(self) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.net(self.x), self.y)

    def hessian(self) -> Tensor:
        names = [name for name, _ in self.net.named_parameters()]
        sizes = [p.numel() for p in self.parameters]

        def loss_at(flat: Tensor) -> Tensor:
            pieces = zip(names, flat.split(sizes), self.parameters, strict=True)
            given = {name: piece.view_as(p) for name, piece, p in pieces}
            return F.binary_cross_entropy_with_logits(functional_call(self.net, given, (self.x,)), self.y)

        return torch.autograd.functional.hessian(loss_at, torch.cat([p.detach().flatten() for p in self.parameters]))


def test_products_with_unit_vectors_are_the_columns_of_the_hessian() -> None:
    problem = Problem()
    product = hessian_product(problem.loss(), problem.parameters)
    exact = problem.hessian()
    torch.testing.assert_close(
        torch.stack([product(row) for row in torch.eye(len(exact))]), exact, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_eigenvalue_of_a_small_net_is_exact_to_a_thousandth(dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    exact = torch.linalg.eigvalsh(problem.hessian().double())[-1]
    found = measure_sharpness(problem.loss(), problem.parameters, lr=0.1)
    assert found.value == pytest.approx(float(exact), rel=1e-3)
    assert found.error <= 1e-3 * found.value
    assert found.products < 64


def test_the_preconditioned_eigenvalue_is_exact_too() -> None:
    problem = Problem()
    optimizer = torch.optim.Adagrad(problem.parameters, lr=0.05, initial_accumulator_value=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()
    diagonal = step_preconditioner(optimizer, problem.parameters).diagonals
    p = torch.cat([d.flatten() for d in diagonal]).double()
    exact = torch.linalg.eigvals(p[:, None] * problem.hessian().double()).real.max()  # of P H itself

    found = measure_sharpness(problem.loss(), problem.parameters, lr=0.05, preconditioner=diagonal)

    assert found.value == pytest.approx(float(exact), rel=1e-3)
    assert found.ratio == pytest.approx(0.05 * float(exact) / 2, rel=1e-3)


def test_the_quadratic_of_figure_3_has_its_edge_at_a_tenth() -> None:
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    loss = 0.5 * (20.0 * w[0] ** 2 + 1.0 * w[1] ** 2)
    for lr, grows in ((0.09, False), (0.11, True)):
        found = measure_sharpness(loss, [w], lr=lr)
        assert found.value == pytest.approx(20.0, rel=1e-6)
        assert found.edge == pytest.approx(0.1, rel=1e-6)
        assert (found.ratio > 1) is grows
        x = torch.tensor([1.0, 1.0])
        for _ in range(200):
            x = x - lr * torch.tensor([20.0, 1.0]) * x
        assert bool(x.norm() > 1) is grows


def test_above_the_preconditioned_edge_a_quadratic_grows_and_below_it_does_not() -> None:
    torch.manual_seed(1)
    a = torch.randn(6, 6, dtype=torch.float64)
    h = a @ a.T
    p = torch.rand(6, dtype=torch.float64) + 0.1
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    edge = measure_sharpness(0.5 * w @ h @ w, [w], lr=1.0, preconditioner=[p], tolerance=1e-10).edge
    for factor, grows in ((0.99, False), (1.01, True)):
        x = torch.ones(6, dtype=torch.float64)
        for _ in range(5000):
            x = x - factor * edge * p * (h @ x)
        assert bool(x.norm() > 1e3) is grows


def test_the_largest_is_by_sign_not_by_size() -> None:
    matrix = torch.diag(torch.tensor([-100.0, 3.0, 1.0]))
    assert largest_eigenvalue(lambda v: matrix @ v, torch.ones(3)).value == pytest.approx(3.0)


def test_a_loss_that_curves_down_everywhere_has_no_edge() -> None:
    w = torch.ones(3, requires_grad=True)
    found = measure_sharpness(-(w**2).sum(), [w], lr=0.1)
    assert (found.value, found.edge, found.ratio) == (pytest.approx(-2.0), float("inf"), 0.0)


def test_the_error_bound_holds_when_products_run_out() -> None:
    torch.manual_seed(0)
    values = torch.linspace(0, 1, 200, dtype=torch.float64) ** 3
    found = largest_eigenvalue(lambda v: values * v, torch.randn(200, dtype=torch.float64), max_products=5)
    assert found.products == 5
    assert float((values - found.value).abs().min()) <= found.error


def test_clustered_eigenvalues_do_not_bring_ghosts() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.full((50,), 1.0), torch.linspace(1.999, 2.0, 50), torch.linspace(0, 0.1, 400)])
    found = largest_eigenvalue(lambda v: values * v, torch.randn(500), tolerance=1e-5)
    assert found.value == pytest.approx(2.0, rel=1e-4)
    assert found.value <= 2.0 * (1 + 1e-6)


def test_parameters_that_the_loss_does_not_use_or_is_linear_in_are_rows_of_zero() -> None:
    used, linear, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
    loss = (used**2).sum() + linear.sum()
    product = hessian_product(loss, [used, linear, unused])
    assert product(torch.ones(6)).tolist() == [2.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(UserError, match="depends on none"):
        hessian_product(used.sum(), [unused])
    assert hessian_product(linear.sum(), [linear])(torch.ones(2)).tolist() == [0.0, 0.0]


def test_what_cannot_be_measured_is_said_in_one_line() -> None:
    problem = Problem()
    parameters = problem.parameters
    with pytest.raises(UserError, match="above 0"):
        measure_sharpness(problem.loss(), parameters, lr=0.1, preconditioner=[torch.zeros_like(p) for p in parameters])
    with pytest.raises(UserError, match="not finite"):
        measure_sharpness(problem.loss() * float("nan"), parameters, lr=0.1)


def test_measuring_leaves_weights_and_gradients_alone_and_repeats_exactly() -> None:
    problem = Problem()
    before = [p.clone() for p in problem.parameters]
    one, two = (measure_sharpness(problem.loss(), problem.parameters, lr=0.1) for _ in range(2))
    assert one == two
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters, strict=True))
    assert all(p.grad is None for p in problem.parameters)


def test_sigma_scales_the_steps_of_its_parameter() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Adagrad([w], lr=0.1, initial_accumulator_value=4.0, eps=0.0)
    (diagonal,) = step_preconditioner(optimizer, [w], sigma={w: 0.25}).diagonals
    assert diagonal.tolist() == [0.125, 0.125]
