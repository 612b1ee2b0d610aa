"""A step reuses what the step before found out, for as long as nothing but the gradients has changed."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import optim

pytestmark = pytest.mark.skipif(not optim.native.kernels.is_available(), reason="only the C kernels reuse a step")

SHAPES = ((300, 400), (6,), (5, 3))  # two chunks; small; small
Change = Callable[[list[nn.Parameter], optim.SigmaOptimizer], object]


def make(name: str = "clippy", **given: Any) -> tuple[list[nn.Parameter], optim.SigmaOptimizer]:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    named = [(f"p{number}", param) for number, param in enumerate(params)]
    groups = [{"pattern": "p1", "method": "gc"}]
    return params, optim.build_optimizer(name, named, groups=groups, **{"lr": 0.3, **given})


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def forget(optimizer: optim.SigmaOptimizer) -> None:
    optimizer._plan = None


def count_gathers(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that grows by one whenever a step finds out anew what it has to do."""
    calls: list[None] = []
    gather = optim.SigmaOptimizer.gather

    def counting(self: optim.SigmaOptimizer, **given: Any) -> Any:
        calls.append(None)
        return gather(self, **given)

    monkeypatch.setattr(optim.SigmaOptimizer, "gather", counting)
    return calls


@pytest.mark.parametrize("name", ["adagrad", "clippy", "gc", "agc", "lamb"])
def test_later_steps_find_out_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = make(name)
    calls = count_gathers(monkeypatch)
    for seed in range(4):
        give_gradients(params, seed)
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 1


def in_place(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.mul_(3)


def learning_rate(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.7


def tensor_learning_rate(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.7)


def idle(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e-3


@pytest.mark.parametrize("change", [in_place, learning_rate, tensor_learning_rate, idle])
def test_gradients_and_learning_rates_are_read_anew(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_follows(change)
    calls = count_gathers(monkeypatch)
    assert_follows(change)
    assert len(calls) == 1 + 3, "one for the optimizer that keeps its plan, one a step for the other"


def hyperparameter(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0]["lambda_abs"] = 1e-3


def method(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0]["method"] = "adagrad"


def weight_decay(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[1]["weight_decay"] = 0.5


def maximize(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0]["maximize"] = True


def no_gradient(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    params[0].grad = None


def other_memory(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        param.data = param.data.clone() * 2


def other_shape(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    total = optimizer.state[params[2]]["sum"]
    params[2].data, total.data = params[2].data[:2], total.data[:2]
    params[2].grad = torch.tensor([[1e-3], [1e-3], [1e3], [1e3], [1e3]]).expand(SHAPES[2]).clone()[:2]


def other_order_in_memory(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    total = optimizer.state[params[0]]["sum"]
    params[0].data, total.data = params[0].data.t(), total.data.t()
    params[0].grad = torch.randn(params[0].shape, generator=torch.Generator().manual_seed(5))


def other_dtype(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        param.grad = None
        param.data = param.data.double()
        optimizer.state[param]["sum"] = optimizer.state[param]["sum"].double()
        param.grad = torch.ones_like(param)


def strided_gradient(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    params[0].grad = torch.randn(SHAPES[0][::-1], generator=torch.Generator().manual_seed(5)).t()


def sparse_gradient(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    params[2].grad = torch.sparse_coo_tensor([[1, 3, 1]], torch.ones(3, 3), SHAPES[2], check_invariants=True)


def wide_gradient(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    narrow, params[2].grad = params[2].data, None
    params[2].data = narrow.double()
    params[2].grad = torch.ones_like(params[2])
    params[2].data = narrow


def other_state(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.state[params[0]]["sum"] = torch.full(SHAPES[0], 9.0)


def fresh_state(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.state.clear()


def smaller_state(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.mul_(1e-3)  # of which nothing clips where G is as it was
    optimizer.state[params[0]]["sum"][1, 100:200] = 1e-9


def smaller_state_behind_the_scenes(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.state[params[0]]["sum"].data.fill_(1e-6)


def state_elsewhere(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.mul_(1e-3)  # of which nothing clips where G is as it was
    total = optimizer.state[params[0]]["sum"]
    total.data = total.data.clone()
    total.data[1, 100:200] = 1e-9


def other_group(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    optimizer.param_groups[0]["lr"] = 0.7


def new_entry(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for group in optimizer.param_groups:
        if group["method"] == "gc":
            group["accumulator"] = "delayed"


def loaded(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["sum"] *= 2
    optimizer.load_state_dict(saved)


def late_group(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    params.append(nn.Parameter(torch.ones(3)))
    optimizer.add_param_group({"params": [("late", params[-1])]})
    params[-1].grad = torch.ones(3)


def left_out(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["param_names"].pop()


def exchanged(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    params[2] = nn.Parameter(torch.ones(SHAPES[2]))
    params[2].grad = torch.ones(SHAPES[2])
    place = next(index for index, group in enumerate(optimizer.param_groups) if "p2" in group["param_names"])
    group = optimizer.param_groups[place]
    group["params"][group["param_names"].index("p2")] = params[2]


def plain_torch(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.defaults["backend"] = "eager"


def statistics(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.collect_stats = True


def not_finite(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.defaults["on_nonfinite"] = "skip"
    assert params[1].grad is not None
    params[1].grad[0] = torch.nan


def assert_follows(change: Change, **given: Any) -> None:
    """Step, change, step twice; the same must come out where nothing is kept from one step to the next."""
    pairs = [make(**given), make(**given)]
    for keeps, (params, optimizer) in zip((True, False), pairs, strict=True):
        give_gradients(params, 0)
        optimizer.step()
        give_gradients(params, 1)
        change(params, optimizer)
        for _ in range(2):
            if not keeps:
                forget(optimizer)
            optimizer.step()
    (params, optimizer), (expected, other) = pairs
    for param, wanted in zip(params, expected, strict=True):
        assert param.equal(wanted)
        assert optimizer.state[param].keys() == other.state[wanted].keys()
        for key, value in other.state[wanted].items():
            assert optimizer.state[param][key].allclose(value, rtol=0, atol=0, equal_nan=True), key
    assert optimizer.clip_stats() == other.clip_stats()
    assert optimizer.skipped_steps == other.skipped_steps


CHANGES = (
    hyperparameter,
    method,
    weight_decay,
    maximize,
    no_gradient,
    other_memory,
    other_shape,
    other_order_in_memory,
    other_dtype,
    strided_gradient,
    sparse_gradient,
    wide_gradient,
    other_state,
    fresh_state,
    smaller_state,
    smaller_state_behind_the_scenes,
    state_elsewhere,
    loaded,
    other_group,
    new_entry,
    late_group,
    left_out,
    exchanged,
    plain_torch,
    statistics,
    not_finite,
)


@pytest.mark.parametrize("change", CHANGES)
def test_every_other_change_is_noticed(change: Change) -> None:
    assert_follows(change)


def test_a_parameter_that_had_no_gradient_is_stepped_once_it_has_one() -> None:
    params, optimizer = make()
    give_gradients(params, 0)
    params[2].grad = None
    optimizer.step()
    before = params[2].detach().clone()
    optimizer.step()
    assert params[2].equal(before)
    give_gradients(params, 1)
    optimizer.step()
    assert not params[2].equal(before)


def test_a_rule_that_was_idle_clips_once_the_learning_rate_has_grown() -> None:
    assert_follows(learning_rate, lr=1e-3)


def test_nothing_is_kept_of_gradients_that_the_loop_has_freed() -> None:
    params, optimizer = make(on_nonfinite="raise")
    give_gradients(params, 0)
    optimizer.step()
    gone = [weakref.ref(param.grad) for param in params if param.grad is not None]
    optimizer.zero_grad()
    assert [ref() for ref in gone] == [None] * 3
    give_gradients(params, 1)
    params[1].grad = torch.full(SHAPES[1], torch.inf)
    gone = [weakref.ref(param.grad) for param in params if param.grad is not None]
    with pytest.raises(FloatingPointError, match="p1"):
        optimizer.step()
    optimizer.zero_grad()
    assert [ref() for ref in gone] == [None] * 3, "also where the step ended with an error"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_have_plans_of_their_own(again: Callable[[Any], Any]) -> None:
    params, optimizer = make()
    give_gradients(params, 0)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    other = again(optimizer)
    theirs = [param for group in other.param_groups for param in group["params"]]
    for param in theirs:
        param.grad = torch.ones_like(param)
    other.step()
    assert all(param.equal(old) for param, old in zip(params, before, strict=True))
    assert not any(param.equal(old) for param, old in zip(theirs, before, strict=True) if param.shape == old.shape)
