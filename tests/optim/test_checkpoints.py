"""`load_state_dict` makes a checkpoint fit or refuses it, and never leaves that to the next step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import optim

NAMES = optim.list_optimizers()


def make(name: str, dtype: torch.dtype = torch.float32, **given: Any) -> tuple[nn.Module, optim.SigmaOptimizer]:
    torch.manual_seed(4)
    model = nn.Linear(4, 3).to(dtype)
    return model, optim.build_optimizer(name, model, lr=0.1, **given)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, scale: float = 1.0) -> None:
    device, dtype = model.weight.device, model.weight.dtype
    for step in range(steps):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) * scale
        optimizer.zero_grad()
        model(batch.to(device, dtype)).square().mean().backward()
        optimizer.step()


def stepped(name: str, dtype: torch.dtype = torch.float32, **given: Any) -> dict[str, Any]:
    model, optimizer = make(name, dtype, **given)
    train(model, optimizer, 2)
    return copy.deepcopy(optimizer.state_dict())


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pre_hook_may_replace_the_state_dict(dtype: torch.dtype) -> None:
    saved = stepped("clippy", dtype)
    wrapped = {"state": {f"p{key}": value for key, value in saved["state"].items()}}
    wrapped["param_groups"] = [{**saved["param_groups"][0], "params": ["p0", "p1"]}]
    reversed_keys = {**saved, "state": {1 - key: value for key, value in saved["state"].items()}}
    reversed_keys["param_groups"] = [{**saved["param_groups"][0], "params": [1, 0]}]
    for other in (wrapped, reversed_keys):
        model, optimizer = make("clippy", dtype)
        optimizer.register_load_state_dict_pre_hook(lambda _optimizer, _given, other=other: copy.deepcopy(other))
        optimizer.load_state_dict({"nothing": "that the optimizer could use"})
        assert optimizer.state[model.weight]["sum"].equal(saved["state"][0]["sum"])
        assert optimizer.state[model.bias]["sum"].equal(saved["state"][1]["sum"])
        assert optimizer.state[model.bias]["sum"].dtype == torch.float32
        train(model, optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_goes_to_the_device_of_the_parameter(name: str) -> None:
    saved = stepped(name, on_nonfinite="skip", collect_stats=True)
    with torch.device("meta"):
        model, optimizer = make(name, on_nonfinite="skip", collect_stats=True)
    optimizer.load_state_dict(saved)
    assert {value.device.type for value in tensors(optimizer)} == {"meta"}
    assert optimizer.param_groups[0]["skipped_steps"].device.type == "meta"
    train(model, optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_counts_that_a_loader_left_on_another_device_are_moved_once(name: str) -> None:
    with torch.device("meta"):
        model, optimizer = make(name, on_nonfinite="skip")
        train(model, optimizer)
    optimizer.param_groups[0]["skipped_steps"] = torch.zeros((), dtype=torch.long)
    for state in optimizer.state.values():
        state |= {key: torch.ones(()) for key, value in state.items() if not value.ndim}
    train(model, optimizer)
    assert {value.device.type for value in tensors(optimizer)} <= {"meta"}
    assert optimizer.param_groups[0]["skipped_steps"].device.type == "meta"


@pytest.mark.parametrize("name", NAMES)
def test_an_older_group_is_completed_from_the_group_at_hand(name: str) -> None:
    saved = stepped(name)
    group = saved["param_groups"][0]
    for key in [*optim.get_info(name).all_hyperparameters, "param_names", "method"]:
        if key != "lr":
            group.pop(key, None)
    group["lr"] = 0.025
    model, optimizer = make(name, maximize=True)
    optimizer.load_state_dict(saved)
    loaded = optimizer.param_groups[0]
    assert (loaded["lr"], loaded["maximize"], loaded["method"]) == (0.025, True, name)
    assert loaded["param_names"] == ["weight", "bias"]
    train(model, optimizer)


def test_a_number_for_a_count_becomes_a_tensor() -> None:
    saved = stepped("clippy_adam")
    for state in saved["state"].values():
        state["step"] = 2
    (model, optimizer), (other, expected) = make("clippy_adam"), make("clippy_adam")
    optimizer.load_state_dict(saved)
    expected.load_state_dict(stepped("clippy_adam"))
    train(model, optimizer)
    train(other, expected)
    assert model.weight.equal(other.weight)
    assert optimizer.state[model.weight]["step"] == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["shorter", "longer", "transposed", "scalar"])
def test_state_of_another_shape_is_refused_at_load(name: str, change: str) -> None:
    if name == "clippy_sgd":
        pytest.skip("gradient descent keeps no state")
    saved = stepped(name)
    state = saved["state"][0]
    key = next(key for key, value in state.items() if value.ndim)
    made = {"shorter": (2, 4), "longer": (300, 4), "transposed": (4, 3), "scalar": ()}
    state[key] = torch.ones(made[change])
    model, optimizer = make(name)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"weight: state '\w+' has shape .* in the checkpoint and \(3, 4\) here"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == before
    train(model, optimizer)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_checked_before_a_step_reads_memory(name: str, backend: str) -> None:
    model, optimizer = make(name, backend=backend)
    train(model, optimizer)
    if name != "clippy_sgd":
        key = next(key for key, value in optimizer.state[model.weight].items() if value.ndim)
        good, optimizer.state[model.weight][key] = optimizer.state[model.weight][key], torch.ones(1, 2)
        with pytest.raises(ValueError, match=rf"weight: state '{key}' has shape \(1, 2\), the parameter \(3, 4\)"):
            train(model, optimizer)
        optimizer.state[model.weight][key] = good
    model.weight.grad = torch.ones(3, 4)
    for size in (2, 5000):  # the parameter shrank, or grew
        model.weight.data = torch.ones(size, 4)
        with pytest.raises(ValueError, match="weight: the gradient has shape"):
            optimizer.step()


@pytest.mark.parametrize("name", ["clippy", "clippy_adam"])
def test_state_follows_the_dtype_of_the_model(name: str) -> None:
    saved = stepped(name)
    model, optimizer = make(name, torch.float64)
    optimizer.load_state_dict(saved)
    wide = optimizer.state[model.weight]
    assert {value.dtype for value in wide.values() if value.ndim} == {torch.float64}
    train(model, optimizer)
    back, narrow = make(name)
    narrow.load_state_dict(optimizer.state_dict())
    assert {value.dtype for value in narrow.state[back.weight].values()} == {torch.float32}
    train(back, narrow)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_checkpoint_of_torchs_adagrad_continues_as_it_is(dtype: torch.dtype, fused: bool) -> None:
    if fused and dtype != torch.float32:
        pytest.skip("torch's kernel for the CPU takes bfloat16, but rounds its state to it")
    models = [make("adagrad", dtype)[0] for _ in range(2)]
    theirs = torch.optim.Adagrad(models[0].parameters(), lr=0.3, initial_accumulator_value=0.2, fused=fused)
    train(models[0], theirs, 2)
    models[1].load_state_dict(models[0].state_dict())
    ours = optim.build_optimizer("adagrad", models[1], lr=0.1)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["initial_accumulator_value"], group["method"]) == (0.3, 0.2, "adagrad")
    assert not {"fused", "foreach", "lr_decay"} & set(group)
    assert set(ours.state[models[1].weight]) == {"sum"}
    train(models[0], theirs, 1)
    train(models[1], ours, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_checkpoint_of_torchs_adamw_brings_its_moments() -> None:
    model, _ = make("clippy_adamw")
    theirs = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=0.3)
    train(model, theirs, 2)
    ours = optim.build_optimizer("clippy_adamw", model, lr=0.1)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["lambda_rel"]) == (0.02, (0.8, 0.9), 0.3, 0.5)
    for key, value in theirs.state[model.weight].items():
        assert ours.state[model.weight][key].equal(value)
    train(model, ours)


def sgd(model: nn.Module, **given: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **given)


@pytest.mark.parametrize(
    ("name", "theirs", "message"),
    [
        ("clippy", lambda m: torch.optim.Adagrad(m.parameters(), lr_decay=0.1), "saved with lr_decay=0.1"),
        ("clippy", lambda m: torch.optim.Adam(m.parameters()), "a state 'exp_avg', which clippy does not keep"),
        ("clippy_adam", lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), "saved with amsgrad=True"),
        ("clippy_adam", lambda m: torch.optim.Adagrad(m.parameters()), "a state 'sum', which clippy_adam"),
        ("clippy_sgd", lambda m: sgd(m, momentum=0.9), "saved with momentum=0.9"),
        ("clippy", lambda m: optim.GC(m.parameters()), "saved by method 'gc', the optimizer has 'clippy'"),
        ("clippy", lambda m: optim.ClippyAdam(m.parameters()), "saved by method 'clippy_adam'"),
    ],
)
def test_the_checkpoint_of_another_step_is_refused_at_load(name: str, theirs: Any, message: str) -> None:
    model, optimizer = make(name)
    other = theirs(model)
    train(model, other)
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(other.state_dict())
    assert "\n" not in str(caught.value)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_the_accumulators_of_another_method_can_be_taken_over_on_purpose() -> None:
    saved = stepped("gc")
    model, optimizer = make("clippy")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
    assert optimizer.state[model.weight]["sum"].equal(saved["state"][0]["sum"])
    assert optimizer.param_groups[0]["method"] == "clippy"


def test_a_saved_setting_out_of_range_is_refused_at_load() -> None:
    saved = stepped("clippy")
    saved["param_groups"][0]["lambda_rel"] = -1.0
    with pytest.raises(ValueError, match=r"group 0 of the checkpoint \(clippy\): lambda_rel must be in"):
        make("clippy")[1].load_state_dict(saved)


def test_groups_that_do_not_fit_are_refused_as_torch_refuses_them() -> None:
    saved = stepped("clippy")
    saved["param_groups"][0]["params"] = [0]
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        make("clippy")[1].load_state_dict(saved)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make("clippy")[1].load_state_dict({**saved, "param_groups": []})


def test_state_that_is_not_whole_is_refused() -> None:
    saved = stepped("clippy_adam")
    del saved["state"][1]["exp_avg_sq"]
    with pytest.raises(ValueError, match="bias: the checkpoint has no state 'exp_avg_sq'"):
        make("clippy_adam")[1].load_state_dict(saved)
