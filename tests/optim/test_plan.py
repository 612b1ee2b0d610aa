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
from step_changes import OTHERS, READ_ANEW, SHAPES, Change, learning_rate

pytestmark = pytest.mark.skipif(not optim.native.kernels.is_available(), reason="only the C kernels reuse a step")


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


@pytest.mark.parametrize("change", READ_ANEW)
def test_gradients_and_learning_rates_are_read_anew(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_follows(change)
    calls = count_gathers(monkeypatch)
    assert_follows(change)
    assert len(calls) == 1 + 3, "one for the optimizer that keeps its plan, one a step for the other"


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


@pytest.mark.parametrize("change", OTHERS)
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
