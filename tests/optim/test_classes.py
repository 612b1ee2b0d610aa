"""The classes with the signature of one method: the same optimizer as `build_optimizer` makes by name."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import optim
from optim.optimizer import Common

CLASSES: dict[str, type[optim.SigmaOptimizer]] = {
    "adagrad": optim.Adagrad,
    "gc": optim.GC,
    "agc": optim.AGC,
    "lamb": optim.LAMB,
    "lamb_adam": optim.LAMBAdam,
    "clippy": optim.Clippy,
    "clippy_adam": optim.ClippyAdam,
    "clippy_adamw": optim.ClippyAdamW,
    "clippy_sgd": optim.ClippySGD,
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().sum().backward()
        optimizer.step()


def fresh() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_every_method_but_the_ablations_has_a_class() -> None:
    ablations = {"clippy_norm2", "clippy_gradient", "clippy_gradient_norm2"}
    assert set(CLASSES) == set(optim.list_optimizers()) - ablations
    assert {kind.__name__ for kind in CLASSES.values()} <= set(optim.__all__)


@pytest.mark.parametrize("name", CLASSES)
def test_the_signature_lists_the_methods_hyperparameters_with_their_defaults(name: str) -> None:
    signature = inspect.signature(CLASSES[name]).parameters
    info = optim.get_info(name)
    common = set(get_type_hints(Common))
    assert common == {"weight_decay", "decoupled_weight_decay", "maximize", "sparse_sigma"} | {
        "on_nonfinite",
        "collect_stats",
        "backend",
    }
    assert set(signature) - {"params", "common"} == set(info.all_hyperparameters) - common
    resolved = info.resolve({}, name)
    for key, parameter in signature.items():
        if key not in ("params", "common") and parameter.default is not None:  # None: the preset decides
            assert parameter.default == resolved[key], key
    assert list(signature)[:2] == ["params", "lr"]


@pytest.mark.parametrize("name", CLASSES)
def test_it_steps_as_build_optimizer_does_and_their_state_is_interchangeable(name: str) -> None:
    given: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.01, "collect_stats": True}
    (one, mine), (other, theirs) = ((model := fresh(), model) for _ in range(2))
    mine_optimizer = CLASSES[name](mine.named_parameters(), **given)
    their_optimizer = optim.build_optimizer(name, theirs, **given)
    assert mine_optimizer.param_groups[0].keys() == their_optimizer.param_groups[0].keys()
    train(one, mine_optimizer)
    train(other, their_optimizer)
    assert_same(one, other)
    assert mine_optimizer.clip_stats() == their_optimizer.clip_stats()
    swapped = copy.deepcopy(mine_optimizer.state_dict()), copy.deepcopy(their_optimizer.state_dict())
    their_optimizer.load_state_dict(swapped[0])
    mine_optimizer.load_state_dict(swapped[1])
    train(one, mine_optimizer)
    train(other, their_optimizer)
    assert_same(one, other)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_the_factory(name: str) -> None:
    model = fresh()
    lr = optim.get_info(name).resolve({}, name)["lr"]
    mine, theirs = CLASSES[name](model.named_parameters()), optim.build_optimizer(name, model, lr=lr)
    assert mine.param_groups == theirs.param_groups


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("name", CLASSES)
def test_copies_and_pickles_keep_the_class(name: str, clone: Any) -> None:
    model = fresh()
    optimizer = CLASSES[name](model.parameters(), lr=0.1)
    train(model, optimizer)
    twin, other = clone((model, optimizer))
    assert type(other) is CLASSES[name]
    train(model, optimizer)
    train(twin, other)
    assert_same(model, twin)


def test_parameter_groups_may_differ_in_hyperparameters_and_method() -> None:
    model = fresh()
    groups = [
        {"params": model[0].parameters(), "clip_norm": 0.5, "lr": 0.2},
        {"params": model[2].parameters(), "method": "adagrad"},
    ]
    optimizer = optim.GC(groups, lr=0.1, clip_norm=0.1)
    assert [(group["method"], group["lr"]) for group in optimizer.param_groups] == [("gc", 0.2), ("adagrad", 0.1)]
    assert optimizer.param_groups[0]["clip_norm"] == 0.5
    train(model, optimizer)


def test_an_explicit_argument_overrides_clippys_preset() -> None:
    (group,) = optim.Clippy([nn.Parameter(torch.ones(2))], preset="tfrs", lambda_rel=0.7).param_groups
    assert (group["lambda_rel"], group["lambda_abs"], group["eps"]) == (0.7, 1e-7, 1e-7)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"clip_nrm": 1.0}, TypeError, "unknown hyperparameter 'clip_nrm'; did you mean clip_norm"),
        ({"clip_norm": 0.0}, ValueError, r"gc: clip_norm must be in \(0, inf\), got 0.0"),
        ({"clip_norm": "1"}, TypeError, "clip_norm must be a number"),
        ({"lr": -1.0}, ValueError, "lr must be in"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, native, eager, compiled"),
        ({"foreach": True}, TypeError, "unknown hyperparameter 'foreach'"),
    ],
)
def test_wrong_arguments_raise(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        optim.GC([nn.Parameter(torch.ones(2))], **given)
