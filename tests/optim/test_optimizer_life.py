"""One step after another: checkpoints, copies, schedules, closures, accumulation, late groups, compilation."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import lr_scheduler, swa_utils

import optim

NAMES = optim.list_optimizers()


def make(name: str, dtype: torch.dtype = torch.float32, **given: Any) -> tuple[nn.Module, optim.SigmaOptimizer]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    given = {"collect_stats": True, "on_nonfinite": "skip", **given}
    groups = [{"pattern": "2.bias", "method": "adagrad"}]
    return model, optim.build_optimizer(name, model, lr=0.1, groups=groups, **given)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator).to(dtype)).square().mean().backward()
        optimizer.step()


def through_disk(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for key, value in one.state_dict().items():
        assert value.equal(other.state_dict()[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumed_from_disk_continues_to_the_bit(name: str, dtype: torch.dtype) -> None:
    whole, optimizer = make(name, dtype)
    train(whole, optimizer, 3, seed=1)
    saved_model, saved = through_disk(whole.state_dict()), through_disk(optimizer.state_dict())
    train(whole, optimizer, 3, seed=2)
    resumed, fresh = make(name, dtype)
    resumed.load_state_dict(saved_model)
    fresh.load_state_dict(saved)
    train(resumed, fresh, 3, seed=2)
    assert_same(whole, resumed)
    assert fresh.clip_stats() == optimizer.clip_stats()
    for state in fresh.state.values():
        for key, value in state.items():
            assert value.dtype in (torch.float32, torch.float64), key


@pytest.mark.parametrize("name", NAMES)
def test_state_and_groups_hold_plain_tensors_numbers_and_strings(name: str) -> None:
    model, optimizer = make(name)
    train(model, optimizer, 1, seed=1)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert all(type(value) is torch.Tensor for value in state.values())
    for group in saved["param_groups"]:
        assert all(isinstance(value, int | float | str | list | tuple | torch.Tensor) for value in group.values())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_and_pickles_step_like_the_original(clone: Callable[[Any], Any]) -> None:
    model, optimizer = make("clippy")
    train(model, optimizer, 2, seed=1)
    model_copy, optimizer_copy = clone((model, optimizer))
    train(model, optimizer, 2, seed=2)
    train(model_copy, optimizer_copy, 2, seed=2)
    assert_same(model, model_copy)
    assert optimizer_copy.collect_stats


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5),
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.1)], optimizer=o),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_no_schedule_of_torchs_is_forgotten() -> None:
    public = {name for module in (lr_scheduler, swa_utils) for name in module.__all__ if _is_schedule(module, name)}
    assert set(SCHEDULERS) == public


def _is_schedule(module: Any, name: str) -> bool:
    known = getattr(module, name)
    return isinstance(known, type) and issubclass(known, lr_scheduler.LRScheduler) and name != "LRScheduler"


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_every_torch_schedule_drives_the_learning_rate(kind: str, tensor_lr: bool) -> None:
    model, optimizer = make("clippy")
    if tensor_lr:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1)
    scheduler = SCHEDULERS[kind](optimizer)
    rates = []
    for _ in range(4):
        train(model, optimizer, 1, seed=1)
        scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert len(set(rates)) > 1 or kind in ("ConstantLR", "LinearLR", "ChainedScheduler")
    assert all(math.isfinite(rate) for rate in rates)


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR"])
def test_a_schedule_that_cycles_betas_takes_a_group_of_adagrad_along(kind: str) -> None:
    model, optimizer = make("clippy_adam")
    rates = {"OneCycleLR": {"max_lr": 0.1, "total_steps": 10}, "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1}}
    scheduler = getattr(lr_scheduler, kind)(optimizer, **rates[kind])  # cycle_momentum is on by default
    before = [group["betas"] for group in optimizer.param_groups]
    train(model, optimizer, 1, seed=1)
    scheduler.step()
    assert [group["method"] for group in optimizer.param_groups] == ["adagrad", "clippy_adam"]
    assert all(group["betas"] != old for group, old in zip(optimizer.param_groups, before, strict=True))
    train(model, optimizer, 1, seed=1)


def test_parameters_appended_to_a_group_are_stepped_and_reported_by_position() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = optim.build_optimizer("clippy", [("first", first)], lr=0.1, collect_stats=True)
    optimizer.param_groups[0]["params"].append(second)
    for param in (first, second):
        param.grad = torch.ones(3)
    optimizer.step()
    assert second.equal(first)
    assert second[0] < 1
    assert list(optimizer.clip_stats()) == list(optimizer.last_step()) == ["parameter_0", "parameter_1"]
    del optimizer.param_groups[0]["param_names"]
    optimizer.step()


def test_equal_names_are_told_apart_in_reports() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    params = [*one.named_parameters(), *other.named_parameters(), nn.Parameter(torch.ones(3))]
    optimizer = optim.build_optimizer("clippy", params, lr=0.1, collect_stats=True)
    for param in (*one.parameters(), *other.parameters(), params[-1]):
        param.grad = torch.ones_like(param)
    expected = ["weight", "bias", "weight#2", "bias#2", "parameter_4"]
    assert list(optim.what_if(optimizer, ["gc"])["gc"]) == expected
    assert list(optim.what_if(optimizer, ["gc"], names=["bias#2"])["gc"]) == ["bias#2"]
    optimizer.step()
    assert list(optimizer.clip_stats()) == list(optimizer.last_step()) == expected


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_step_at_learning_rate_0_does_not_count_in_the_statistics(tensor_lr: bool) -> None:
    (model, optimizer), (other, expected) = make("lamb"), make("lamb")
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if tensor_lr else 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same(model, other)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    train(model, optimizer, 2, seed=1)
    train(other, expected, 2, seed=1)
    assert optimizer.clip_stats() == expected.clip_stats()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_state_made_in_inference_mode_can_be_written_to_outside(name: str, backend: str) -> None:
    param = nn.Parameter(torch.ones(5))
    optimizer = optim.build_optimizer(name, [param], lr=0.1, backend=backend, collect_stats=True, on_nonfinite="skip")
    param.grad = torch.ones(5)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert not any(value.is_inference() for value in optimizer.state[param].values())
    assert param[0] < 1


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_learning_rate_steps_as_the_number(name: str, backend: str) -> None:
    models = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        torch.manual_seed(4)
        model = nn.Linear(4, 1)
        train(model, optim.build_optimizer(name, model, lr=lr, backend=backend), 3, seed=1)
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_maximize_ascends_where_the_other_descends(name: str) -> None:
    up, down = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    up.grad, down.grad = torch.linspace(-1, 1, 4), -torch.linspace(-1, 1, 4)
    optim.build_optimizer(name, [up], lr=0.1, maximize=True).step()
    optim.build_optimizer(name, [down], lr=0.1).step()
    assert up.equal(down)


@pytest.mark.parametrize("name", NAMES)
def test_coupled_decay_joins_the_gradient_and_decoupled_decay_shrinks_the_weight(name: str) -> None:
    weight, grad = torch.randn(6), torch.randn(6)

    def step(gradient: torch.Tensor, **given: Any) -> torch.Tensor:
        param = nn.Parameter(weight.clone())
        param.grad = gradient
        optim.build_optimizer(name, [param], lr=0.1, **{"weight_decay": 0.0, **given}).step()
        return param.detach()

    if name != "lamb_adam":  # whose decay joins r: tests/optim/test_rules.py
        joined = step(grad + 0.3 * weight, decoupled_weight_decay=False)
        torch.testing.assert_close(step(grad, weight_decay=0.3, decoupled_weight_decay=False), joined)
    beside = step(grad, decoupled_weight_decay=True) - 0.1 * 0.3 * weight
    torch.testing.assert_close(step(grad, weight_decay=0.3, decoupled_weight_decay=True), beside)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    model, optimizer = make("clippy")
    before = copy.deepcopy(model.state_dict())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) > 0
    assert not model.state_dict()["0.weight"].equal(before["0.weight"])


def test_accumulated_gradients_step_as_their_sum() -> None:
    (one, first), (other, second) = make("clippy"), make("clippy")
    batch = torch.randn(8, 4)
    one(batch).square().mean().backward()
    for part in batch.split(2):
        (other(part).square().mean() / 4).backward()
    first.step()
    second.step()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_grad_scaler_unscales_before_the_step_and_skips_infinities() -> None:
    (plain, first), (scaled, second) = make("clippy"), make("clippy")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    batch = torch.randn(8, 4)
    plain(batch).square().mean().backward()
    first.step()
    scaler.scale(scaled(batch).square().mean()).backward()
    scaler.step(second)
    scaler.update()
    for mine, theirs in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    before = copy.deepcopy(scaled.state_dict())
    for param in scaled.parameters():
        param.grad = torch.full_like(param, torch.inf)
    scaler.step(second)
    for key, value in scaled.state_dict().items():
        assert value.equal(before[key])


def test_a_group_added_late_may_have_a_method_of_its_own() -> None:
    model, optimizer = make("clippy")
    train(model, optimizer, 1, seed=1)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "method": "gc", "clip_norm": 0.5})
    late.grad = torch.ones(3)
    optimizer.step()
    assert (late < 1).all()
    assert optimizer.param_groups[-1]["clip_norm"] == 0.5
    assert "lambda_rel" not in optimizer.param_groups[-1]
    with pytest.raises(TypeError, match="did you mean clip_norm"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "method": "gc", "clip_nrm": 0.5})


def test_a_torch_adagrad_checkpoint_brings_its_accumulator() -> None:
    param = nn.Parameter(torch.ones(3))
    theirs = torch.optim.Adagrad([param], lr=0.1)
    param.grad = torch.ones(3)
    theirs.step()
    ours = optim.build_optimizer("clippy", [param], lr=0.1)
    saved = ours.state_dict()
    ours.load_state_dict({**saved, "state": theirs.state_dict()["state"]})
    ours.step()
    assert ours.state[param]["sum"].equal(torch.full((3,), 2.0))


TRACED = ("agc", "clippy", "clippy_sgd", "lamb_adam")  # a rule by unit, by coordinate, without state and on Adam


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        *(pytest.param(name, "eager", marks=() if name in TRACED else pytest.mark.slow) for name in NAMES),
        pytest.param("clippy", "inductor", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_the_step_compiles_and_gives_the_same_result(name: str, compiler: str) -> None:
    (plain, first), (compiled, second) = make(name), make(name)
    train(plain, first, 1, seed=1)
    train(compiled, second, 1, seed=1)  # state exists before the graph is captured
    torch._dynamo.reset()
    step = torch.compile(second.step, backend=compiler)
    for seed in (2, 3):
        for model, optimizer, go in ((plain, first, first.step), (compiled, second, step)):
            optimizer.zero_grad()
            torch.manual_seed(seed)
            model(torch.randn(8, 4)).square().mean().backward()
            go()
    for mine, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_the_step_is_one_graph_that_follows_a_tensor_learning_rate(name: str) -> None:
    (plain, first), (compiled, second) = make(name), make(name)
    rates = [torch.tensor(0.1), torch.tensor(0.1)]
    for (model, optimizer), rate in zip(((plain, first), (compiled, second)), rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        train(model, optimizer, 1, seed=1)
    torch._dynamo.reset()
    graphs = CompileCounter()
    step = torch.compile(second.step, backend=graphs, fullgraph=True)
    for seed, value in ((2, 0.1), (3, 0.3), (4, 0.01)):
        for model, optimizer, rate, go in ((plain, first, rates[0], first.step), (compiled, second, rates[1], step)):
            rate.fill_(value)
            optimizer.zero_grad(set_to_none=False)
            torch.manual_seed(seed)
            model(torch.randn(8, 4)).square().mean().backward()
            go()
    assert graphs.frame_count == 1
    for mine, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
