"""Infinite and NaN gradients: propagate, skip, raise."""

from __future__ import annotations

import pytest
import torch

import optim

NAMES = ["adagrad", "gc", "agc", "lamb", "clippy", "clippy_adam", "clippy_sgd"]
BAD = [float("nan"), float("inf"), float("-inf")]


def make(name: str, policy: str, backend: str = "auto") -> tuple[list[torch.nn.Parameter], optim.SigmaOptimizer]:
    params = [torch.nn.Parameter(torch.randn(5, 4)), torch.nn.Parameter(torch.randn(3))]
    return params, optim.build_optimizer(name, params, lr=0.1, on_nonfinite=policy, collect_stats=True, backend=backend)


def fill(params: list[torch.nn.Parameter], bad: float | None = None) -> None:
    for param in params:
        param.grad = torch.randn_like(param)
    if bad is not None:
        params[0].grad[2, 1] = bad  # type: ignore[index]


def bits(params: list[torch.nn.Parameter], optimizer: optim.SigmaOptimizer) -> list[torch.Tensor]:
    states = [value for param in params for value in optimizer.state[param].values()]
    return [tensor.detach().clone() for tensor in (*params, *states)]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_skip_leaves_parameters_and_state_untouched_by_one_bit_and_counts(name: str, bad: float, backend: str) -> None:
    params, optimizer = make(name, "skip", backend)
    fill(params)
    optimizer.step()
    before = bits(params, optimizer)
    fill(params, bad)
    optimizer.step()
    assert all(now.equal(then) for now, then in zip(bits(params, optimizer), before, strict=True))
    assert optimizer.skipped_steps == 1
    fill(params)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not params[1].equal(before[1])


PLACES = (0, 65_535, 65_536, 2 * 65_536 - 400, 2 * 65_536 + 5, -1)  # ends of chunks and of the tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0], ids=["hardly clips", "clips hard"])
@pytest.mark.parametrize("given", [{}, {"weight_decay": 1e-2}, {"lr": 1e-3}], ids=str)
@pytest.mark.parametrize("name", ["adagrad", "gc", "agc", "lamb", "clippy"])
def test_skip_sees_one_bad_value_among_many(
    name: str, given: dict[str, float], scale: float, dtype: torch.dtype
) -> None:
    param = torch.nn.Parameter(torch.randn(2 * 65_536 + 777, dtype=dtype))
    optimizer = optim.build_optimizer(name, [param], **{"lr": 0.1, "on_nonfinite": "skip", **given})
    for number in range(3):
        param.grad = scale * torch.randn_like(param)
        optimizer.step()
        assert optimizer.skipped_steps == 0, number
    before = bits([param], optimizer)
    for number, place in enumerate(PLACES):
        for count, bad in enumerate(BAD):
            param.grad = scale * torch.randn_like(param)
            param.grad[place] = bad
            optimizer.step()
            assert optimizer.skipped_steps == number * len(BAD) + count + 1, (place, bad)
    assert all(now.equal(then) for now, then in zip(bits([param], optimizer), before, strict=True))
    param.grad = scale * torch.randn_like(param)
    optimizer.step()
    assert optimizer.skipped_steps == len(PLACES) * len(BAD)
    assert not param.equal(before[0])


def test_what_the_step_before_knew_of_its_gradients_is_forgotten() -> None:
    params, optimizer = make("clippy", "skip")
    fill(params)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-3  # below lambda_abs, where Clippy has no first pass
    fill(params, torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1


def test_skip_in_the_very_first_step_leaves_a_fresh_state() -> None:
    params, optimizer = make("clippy", "skip")
    before = [param.detach().clone() for param in params]
    fill(params, torch.nan)
    optimizer.step()
    assert all(now.equal(then) for now, then in zip(params, before, strict=True))
    assert optimizer.state[params[0]]["sum"].equal(torch.full((5, 4), 0.1))


@pytest.mark.parametrize("bad", BAD)
def test_skip_sees_a_bad_value_in_a_sparse_gradient(bad: float) -> None:
    table, bias = torch.nn.Parameter(torch.randn(9, 2)), torch.nn.Parameter(torch.randn(3))
    optimizer = optim.build_optimizer("clippy", [table, bias], lr=0.1, on_nonfinite="skip")
    before = [table.detach().clone(), bias.detach().clone()]
    values = torch.tensor([[1.0, bad], [1.0, 1.0]])
    table.grad = torch.sparse_coo_tensor(torch.tensor([[2, 5]]), values, (9, 2), check_invariants=True)
    bias.grad = torch.ones(3)
    optimizer.step()
    assert table.equal(before[0])
    assert bias.equal(before[1])
    assert optimizer.skipped_steps == 1


def test_the_count_of_skipped_steps_is_in_the_state_dict() -> None:
    params, optimizer = make("gc", "skip")
    fill(params, torch.inf)
    optimizer.step()
    _, other = make("gc", "skip")
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 1


@pytest.mark.parametrize("bad", BAD)
def test_raise_names_the_parameter_and_changes_nothing(bad: float) -> None:
    params, optimizer = make("clippy", "raise")
    before = [param.detach().clone() for param in params]
    fill(params, bad)
    with pytest.raises(FloatingPointError, match=r"gradient of parameter_0 is not finite"):
        optimizer.step()
    assert all(now.equal(then) for now, then in zip(params, before, strict=True))
    fill(params)
    optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_propagate_shows_in_the_parameter_and_only_there(name: str, backend: str) -> None:
    params, optimizer = make(name, "propagate", backend)
    fill(params, torch.nan)
    optimizer.step()
    assert params[0].isnan().any()
    assert params[1].isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_nan_poisons_clippys_whole_tensor_as_in_the_authors_code(backend: str) -> None:
    params, optimizer = make("clippy", "propagate", backend)
    optimizer.param_groups[0]["lr"] = 10.0
    fill(params, torch.nan)
    optimizer.step()
    assert params[0].isnan().all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", optim.list_optimizers())
def test_a_gradient_whose_square_overflows_counts_as_not_finite(name: str, backend: str) -> None:
    """An infinite accumulator holds its coordinate still for good. Gradient descent keeps none."""
    params, optimizer = make(name, "skip", backend)
    before = bits(params, optimizer)
    fill(params, -2e19)  # its square is 4e38
    optimizer.step()
    assert optimizer.skipped_steps == int(name != "clippy_sgd")
    if name != "clippy_sgd":
        assert all(now.equal(then) for now, then in zip(bits(params, optimizer), before, strict=False))
    fill(params, -1e18)
    optimizer.step()
    assert optimizer.skipped_steps == int(name != "clippy_sgd")
    assert all(value.isfinite().all() for value in bits(params, optimizer))
