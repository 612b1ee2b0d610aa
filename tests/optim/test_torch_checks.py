"""What torch's own tests ask of an optimizer, for every method and backend, and the README's table of the answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.optim.swa_utils import SWALR, AveragedModel

import optim
from optim import eager, support
from optim.native.backend import NATIVE
from optim.registry import CAPABILITIES

NAMES = optim.list_optimizers()
BACKENDS = ["auto", *(pytest.param(backend, marks=pytest.mark.slow) for backend in ("eager", "compiled"))]
ELSEWHERE = {"compile": "test_optimizer_life.py", "foreach": "test_build_optimizer.py"}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Model, Make = nn.Module, Callable[..., optim.SigmaOptimizer]


def fresh() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def loss(model: nn.Module, step: int = 0) -> torch.Tensor:
    return model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean()


def train(model: nn.Module, optimizer: Any, steps: int = 2, first: int = 0) -> nn.Module:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return model


def assert_same(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        whole = one.full_tensor() if hasattr(one, "full_tensor") else one
        torch.testing.assert_close(whole.detach(), expected.detach(), **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone. Two processes are tested in test_sharded_parameters.py."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def _nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiled backend call what it would compile; test_compiled.py compares the two."""
    for name in ("reduce_piece", "step_piece"):
        monkeypatch.setitem(eager.COMPILED.__dict__, name, getattr(eager.EAGER, name))


def check_dense(make: Make) -> None:
    model = fresh()
    before = copy.deepcopy(model)
    train(model, make(model), steps=1)
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert one.isfinite().all()
        assert not one.equal(other)


def check_narrow(make: Make) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = fresh()
        narrow, wide = copy.deepcopy(model).to(dtype), copy.deepcopy(model).to(dtype).float()
        for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.float()
        optimizer = make(narrow)
        optimizer.step()
        make(wide).step()
        assert_same(narrow, wide.to(dtype))
        assert {value.dtype for state in optimizer.state.values() for value in state.values()} <= {torch.float32}


def check_sparse(make: Make) -> None:
    tables = [nn.Embedding(9, 3, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    ids = torch.tensor([1, 4, 4])
    before = tables[0].weight.detach().clone()
    optimizers = [make(tables[0], weight_decay=0.0), make([tables[1].weight], weight_decay=0.0)]
    for table, optimizer in zip(tables, optimizers, strict=True):
        table(ids).square().sum().backward()
        optimizer.step()
    assert tables[0].weight[0].equal(before[0])
    assert not tables[0].weight[4].equal(before[4])


def check_dtensor(make: Make) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fresh()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    expected = fresh()
    assert_same(train(model, make(model)), train(expected, make(expected)), rtol=1e-5, atol=1e-6)


def check_zero(make: Make) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def zero(model: nn.Module) -> ZeroRedundancyOptimizer:
        own = {**make(model).defaults}
        given = {key: own[key] for key in ("method", "lr", "backend", "on_nonfinite", "collect_stats")}
        return ZeroRedundancyOptimizer(model.parameters(), optim.SigmaOptimizer, **given)

    model, expected = fresh(), fresh()
    optimizer, other = zero(model), make(expected)
    assert_same(train(model, optimizer), train(expected, other))
    optimizer.consolidate_state_dict()
    resumed = fresh()
    resumed.load_state_dict(model.state_dict())
    again = zero(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(train(resumed, again, first=2), train(expected, other, first=2))


def check_checkpoint(make: Make) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        expected = fresh()
        other = make(expected, collect_stats=True)
        get_optimizer_state_dict(expected, other, options=options)  # makes the state by a step at learning rate 0
        assert {row["steps"] for row in other.clip_stats().values()} <= {0}
        assert_same(expected, fresh())
        train(expected, other)
        saved = copy.deepcopy(get_optimizer_state_dict(expected, other, options=options))
        model = fresh()
        model.load_state_dict(expected.state_dict())
        optimizer = make(model, collect_stats=True)
        set_optimizer_state_dict(model, optimizer, saved, options=options)
        assert optimizer.clip_stats() == other.clip_stats()
        assert_same(train(model, optimizer, first=2), train(expected, other, first=2))


def check_closure(make: Make) -> None:
    model = fresh()
    optimizer = make(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    before = loss(model).item()
    with torch.no_grad():
        assert optimizer.step(closure).item() == before  # type: ignore[attr-defined]
    assert loss(model).item() != before


def check_tensor_lr(make: Make) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        decay = {"weight_decay": 0.1, "decoupled_weight_decay": True}
        lr = torch.tensor(2**-9, dtype=dtype)  # the same number in every dtype
        model, expected = fresh(), fresh()
        train(model, make(model, lr=lr, **decay))
        train(expected, make(expected, lr=2**-9, **decay))
        assert_same(model, expected, rtol=1e-6, atol=1e-7)


def check_hooks(make: Make) -> None:
    model = fresh()
    optimizer, seen = make(model), []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: seen.append(what)

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(note("any step")),
        torch_optimizer.register_optimizer_step_post_hook(note("any stepped")),
        optimizer.register_step_pre_hook(note("step")),
        optimizer.register_step_post_hook(note("stepped")),
        optimizer.register_state_dict_pre_hook(note("save")),
        optimizer.register_state_dict_post_hook(note("saved")),
        optimizer.register_load_state_dict_pre_hook(note("load")),
    ]
    dtypes = []
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: dtypes.extend(value.dtype for state in loaded.state.values() for value in state.values())
    )
    model.bfloat16()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in handles:
        handle.remove()
    assert sorted(seen) == sorted(["any step", "any stepped", "step", "stepped", "save", "saved", "load"])
    assert seen.index("step") < seen.index("stepped") < seen.index("save") < seen.index("saved") < seen.index("load")
    assert set(dtypes) <= {torch.float32}


def check_grad_scaler(make: Make) -> None:
    model, expected = fresh(), fresh()
    optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(loss(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(model, train(expected, make(expected), steps=1))
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.inf)
    scaler.step(optimizer)
    assert_same(model, expected)


def check_in_backward(make: Make) -> None:
    model, expected = fresh(), fresh()
    for param in model.parameters():
        optimizer = make([param])

        def step(param: torch.Tensor, optimizer: optim.SigmaOptimizer = optimizer) -> None:
            optimizer.step()
            param.grad = None

        param.register_post_accumulate_grad_hook(step)
    for number in range(2):
        loss(model, number).backward()
    assert_same(model, train(expected, make(expected)), rtol=1e-6, atol=1e-7)


def check_functional(make: Make) -> None:
    model, expected = fresh(), fresh()
    optimizer = make(model)
    named = {name: param.detach() for name, param in model.named_parameters()}
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    grads = torch.func.grad(lambda params: torch.func.functional_call(model, params, batch).square().mean())(named)
    for name, param in model.named_parameters():
        param.grad = grads[name]
    optimizer.step()
    assert_same(model, train(expected, make(expected), steps=1))

    def step(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        weight.grad = grad
        make([weight]).step()
        return weight

    weight, grad = torch.randn(4, 3), torch.randn(4, 3)
    with torch.no_grad():
        functional = torch.func.functionalize(step)(weight.clone(), grad)
        torch.testing.assert_close(functional, step(weight.clone(), grad))


def check_swa(make: Make) -> None:
    model = fresh()
    optimizer = make(model)
    average, schedule = AveragedModel(model), SWALR(optimizer, swa_lr=0.05, anneal_epochs=1)
    seen = []
    for step in range(2):
        train(model, optimizer, steps=1, first=step)
        average.update_parameters(model)
        schedule.step()
        seen.append(copy.deepcopy(model))
    mean = [(one + other) / 2 for one, other in zip(*(model.parameters() for model in seen), strict=True)]
    for mine, expected in zip(average.module.parameters(), mean, strict=True):
        torch.testing.assert_close(mine, expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def check_profiler(make: Make) -> None:
    model = fresh()
    optimizer = make(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, steps=1)
    assert "Optimizer.step#SigmaOptimizer.step" in {event.name for event in profile.events()}


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def test_every_capability_of_the_registry_has_its_check() -> None:
    assert set(CHECKS) | set(ELSEWHERE) == set(CAPABILITIES)


@pytest.mark.usefixtures("process_group", "_nothing_to_compile")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capability", CHECKS)
def test_a_method_supports_what_the_registry_says(capability: str, name: str, backend: str) -> None:
    assert optim.get_info(name).supports[capability]

    def make(params: Any, **given: Any) -> optim.SigmaOptimizer:
        return optim.build_optimizer(name, params, **{"lr": 0.1, "backend": backend, **given})

    CHECKS[capability](make)


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_knows_which_methods_have_c_kernels(name: str) -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    (local,) = optim.build_optimizer(name, [param], lr=0.1).gather()
    assert support.answers(name)[support.KERNELS] == NATIVE.takes(local)


def test_the_table_in_the_readme_is_the_registrys() -> None:
    text = support.README.read_text(encoding="utf-8")
    assert text == support.with_table(text), "run: python -m optim.support"
