"""`clip_stats`, `last_step` and `what_if`: what they report, and that they do not wait for the device."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optim


def parameter(weight: Any, grad: Any) -> nn.Parameter:
    made = nn.Parameter(torch.as_tensor(weight))
    made.grad = torch.as_tensor(grad)
    return made


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_report_is_of_the_step_that_was_taken(backend: str) -> None:
    weight, grad = torch.randn(80_000), torch.randn(80_000)
    param = parameter(weight.clone(), grad)
    optimizer = optim.build_optimizer("clippy", [("w", param)], lr=0.5, collect_stats=True, backend=backend)
    optimizer.step()
    row = optimizer.clip_stats()["w"]
    change = weight - param.detach()
    full = 0.5 * grad / (0.1 + grad**2).sqrt()
    bound = 0.5 * weight.abs() + 1e-2
    assert row["sigma"] == pytest.approx(float((bound / full.abs()).min()), rel=1e-5)
    assert row["coordinate"] == int((full.abs() / bound).argmax())
    assert row["term"] == ("relative" if 0.5 * weight[row["coordinate"]].abs() > 1e-2 else "absolute")
    assert row["update_max"] == pytest.approx(float(change.abs().max()), rel=1e-3)
    assert row["update_norm"] == pytest.approx(float(change.norm()), rel=1e-3)
    assert (row["steps"], row["clipped_steps"], row["clipped_fraction"]) == (1, 1, 1.0)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", ["adagrad", "gc", "agc", "lamb", "clippy"])
@pytest.mark.parametrize("more", [{}, {"clip_accumulator": True}, {"lr": 1e-3}, {"by": "unit"}], ids=str)
def test_the_norms_are_those_of_the_change_however_it_was_made(backend: str, name: str, more: dict[str, Any]) -> None:
    if not set(more) <= set(optim.get_info(name).all_hyperparameters):
        pytest.skip(f"{name} has no such hyperparameter")
    weight, grad = torch.randn(3, 50_000), torch.randn(3, 50_000)
    param = parameter(weight.clone(), grad)
    given = {"lr": 0.5, "collect_stats": True, "backend": backend} | more
    optimizer = optim.build_optimizer(name, [("w", param)], **given)
    optimizer.step()
    row, change = optimizer.clip_stats()["w"], weight - param.detach()
    # The change of weights of about 1 has a rounding error of 1e-7.
    assert row["update_max"] == pytest.approx(float(change.abs().max()), rel=1e-3, abs=1e-6)
    assert row["update_norm"] == pytest.approx(float(change.norm()), rel=1e-3, abs=1e-4)


def test_the_norms_of_a_step_that_is_not_finite_are_not_either() -> None:
    for backend in ("auto", "eager"):
        param = parameter(torch.randn(80_000), torch.randn(80_000))
        assert param.grad is not None
        param.grad[70_000] = torch.nan
        optimizer = optim.build_optimizer("adagrad", [("w", param)], lr=0.5, collect_stats=True, backend=backend)
        optimizer.step()
        row = optimizer.clip_stats()["w"]
        assert row["update_max"] != row["update_max"]
        assert row["update_norm"] != row["update_norm"]


def test_the_term_that_bound_is_the_largest_at_the_coordinate() -> None:
    given = {"lr": 1.0, "collect_stats": True, "lambda_rel": 0.5, "lambda_abs": 1e-2}
    for weight, more, term in (
        (1.0, {}, "relative"),
        (1e-3, {}, "absolute"),
        (1e-3, {"lambda_acc": 0.1}, "accumulator"),
    ):
        param = parameter([weight, 9.0], [1.0, 0.0])
        optimizer = optim.build_optimizer("clippy", [("w", param)], **given, **more)
        optimizer.step()
        row = optimizer.clip_stats()["w"]
        assert (row["coordinate"], row["term"]) == (0, term)


def test_minimum_moving_average_and_count_run_over_the_steps() -> None:
    param = parameter([0.0, 1.0], [1.0, 0.0])
    optimizer = optim.build_optimizer("gc", [("w", param)], lr=0.1, clip_norm=1.0, collect_stats=True)
    sigmas = []
    for norm in (4.0, 2.0, 0.5):
        param.grad = torch.tensor([0.0, norm])
        optimizer.step()
        sigmas.append(min(1.0, 1.0 / norm))
    row = optimizer.clip_stats()["w"]
    assert row["sigma"] == 1.0
    assert row["sigma_min"] == 0.25
    assert (row["steps"], row["clipped_steps"]) == (3, 2)
    decay = optim.stats.DECAY
    weights = [decay**2, decay, 1.0]
    mean = sum(weight * sigma for weight, sigma in zip(weights, sigmas, strict=True)) / sum(weights)
    assert row["sigma_mean"] == pytest.approx(mean)
    assert (row["coordinate"], row["term"]) == (None, None)


def test_nothing_is_kept_unless_asked_for_and_asking_may_start_late(model: nn.Module, backward: Any) -> None:
    optimizer = optim.build_optimizer("clippy", model, lr=0.1)
    backward(model)
    optimizer.step()
    assert optimizer.clip_stats() == {}
    assert all("clip_stats" not in state for state in optimizer.state.values())
    optimizer.collect_stats = True
    assert optimizer.clip_stats() == {}
    optimizer.step()
    assert set(optimizer.clip_stats()) == {name for name, _ in model.named_parameters()}


def test_statistics_do_not_change_the_step(model: nn.Module, backward: Any) -> None:
    models = [copy.deepcopy(model) for _ in range(2)]
    for one, collect in zip(models, (False, True), strict=True):
        optimizer = optim.build_optimizer("clippy", one, lr=0.5, collect_stats=collect)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            backward(one)
            optimizer.step()
    for first, second in zip(*(one.parameters() for one in models), strict=True):
        assert first.equal(second)


def test_zeros_held_still_by_a_tiny_lambda_abs_are_named_once() -> None:
    param = parameter([0.0, 1.0], [1.0, 1.0])
    optimizer = optim.build_optimizer("clippy", [("bias", param)], lr=0.1, preset="tfrs", collect_stats=True)
    optimizer.step()
    with pytest.warns(UserWarning, match="bias: held still, because a weight of 0 may move by lambda_abs only"):
        assert optimizer.clip_stats()["bias"]["still"]
    optimizer.step()
    optimizer.clip_stats()


def test_what_if_says_what_the_other_methods_do_and_changes_nothing(step_once: Any) -> None:
    weight, grad = torch.randn(6, 5), torch.randn(6, 5)
    param = parameter(weight.clone(), grad.clone())
    optimizer = optim.build_optimizer("adagrad", [("w", param)], lr=0.5)
    rules = {"gc": {}, "tight": {"method": "agc", "clip_factor": 1e-3}, "clippy": {}, "lamb": {}, "adagrad": {}}
    report = optim.what_if(optimizer, rules)
    assert not optimizer.state
    assert param.equal(weight)
    assert report["adagrad"] == {"w": 1.0}
    for label, given in rules.items():
        given = dict(given)
        _, other = step_once(given.pop("method", label), weight, grad, lr=0.5, **given)
        assert report[label]["w"] == pytest.approx(other.clip_stats()["w"]["sigma"], rel=1e-6)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optim.what_if(optimizer, ["gc", "agc", "clippy"])
    assert optimizer.state[param]["sum"].equal(saved["state"][0]["sum"])


def test_what_if_looks_at_the_optimizers_own_direction() -> None:
    param = parameter(torch.randn(9), torch.randn(9))
    optimizer = optim.build_optimizer("clippy_sgd", [("w", param)], lr=0.5)
    report = optim.what_if(optimizer, {"clippy": {"lambda_rel": 0.1}})
    bound = 0.1 * param.detach().abs() + 1e-2
    assert report["clippy"]["w"] == pytest.approx(float((bound / (0.5 * param.grad.abs())).min()), rel=1e-5)


def test_what_if_refuses_unknown_rules_and_hyperparameters() -> None:
    optimizer = optim.build_optimizer("adagrad", [parameter([1.0], [1.0])], lr=0.5)
    with pytest.raises(ValueError, match="did you mean clippy"):
        optim.what_if(optimizer, ["clipy"])
    with pytest.raises(TypeError, match="did you mean clip_norm"):
        optim.what_if(optimizer, {"gc": {"clipnorm": 1.0}})


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", optim.list_optimizers())
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_no_step_waits_for_the_device(name: str, backend: str, sparse: bool, tensor_lr: bool) -> None:
    table = nn.Embedding(9, 3, sparse=sparse)
    layer = nn.Linear(3, 2).bfloat16()
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    given = {"lr": lr, "collect_stats": True, "on_nonfinite": "skip", "backend": backend, "embedding": {"method": name}}
    if name == "clippy_adamw":
        given["embedding"] = {"method": "clippy_adam"}
    optimizer = optim.build_optimizer(name, nn.ModuleList([table, layer]), **given)
    for _ in range(2):
        layer(table(torch.tensor([1, 1, 4])).bfloat16()).sum().backward()
        with _Counter() as counter, torch.profiler.profile() as profile:
            optimizer.step()
        seen = set(counter.names)
        if (name, backend) != ("adagrad", "eager"):  # torch's fused CPU kernel reads its step count inside
            seen |= {event.name for event in profile.events() or ()}
        assert not {event for event in seen if "_local_scalar_dense" in event or event.endswith("::item")}


def test_the_state_holds_no_more_after_many_steps() -> None:
    params = [parameter(torch.randn(50), torch.randn(50)) for _ in range(3)]
    optimizer = optim.build_optimizer("clippy", params, lr=0.1, collect_stats=True, on_nonfinite="skip")

    def size() -> int:
        return len(pickle.dumps(optimizer))

    optimizer.step()
    optimizer.step()
    before = size()
    for _ in range(20):
        optimizer.step()
    assert size() == before


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", ["clippy", "lamb", "clippy_adam"])
def test_no_memory_is_held_that_grows_with_the_steps(name: str, backend: str) -> None:
    table, layer = nn.Embedding(9, 3, sparse=True), nn.Linear(3, 2)
    given = {"collect_stats": True, "on_nonfinite": "skip", "backend": backend, "embedding": {"method": name}}
    optimizer = optim.build_optimizer(name, nn.ModuleList([table, layer]), lr=0.1, **given)

    def after(count: int) -> tuple[int, int]:
        """Take steps; return how many tensors are alive, and the bytes of their elements."""
        for _ in range(count):
            optimizer.zero_grad()
            layer(table(torch.tensor([1, 1, 4]))).sum().backward()
            optimizer.step()
            optimizer.clip_stats()
        gc.collect()
        alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return len(alive), sum(tensor.numel() * tensor.element_size() for tensor in alive if not tensor.is_sparse)

    after(20)
    assert after(20) == after(60)
