"""What can be proven about CUDA without a GPU: a step traced with fake tensors mixes no devices and never waits.

FakeTensorMode computes shapes, dtypes and devices alone. It raises where an operation mixes devices, and where Python
asks for a number that only the device has (`item`, `bool`, a shape that depends on data).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from optim import eager, torch_private

NAMES = optim.list_optimizers()
FUSED = torch.ops.aten._fused_adagrad_


class Watch(TorchDispatchMode):
    """Records operations, checks their devices, and stands in for the fused kernel, which has no fake version."""

    def __init__(self, *, cpu_numbers: bool = False) -> None:
        super().__init__()
        self.names: list[str] = []
        self.cpu_numbers = cpu_numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        # A kernel takes a number that is a tensor on the CPU as an argument, but a condition or a copy waits for it.
        numbers = self.cpu_numbers and self.names[-1] != "where"
        devices = [value.device.type for value in tensors if not (numbers and value.ndim == 0)]
        assert set(devices) <= {"cuda"}, (func, [value.device for value in tensors])
        if func.overloadpacket is FUSED:
            return None
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Stands in for `copy_`, which wants a build for CUDA even of fake tensors: the same checks, and no copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_:
            return func(*args, **(kwargs or {}))
        target, source = args
        assert source.device == target.device
        assert source.expand(target.shape).shape == target.shape
        return target.add_(source)  # an operation in place that the trace sees


@pytest.fixture
def _cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer as a build of torch for CUDA does for plain tensors, and trace what is to be compiled as it is."""
    monkeypatch.setattr(torch_private, "has_fused_adagrad", lambda _tensor: True)
    for name in ("reduce_piece", "step_piece"):
        monkeypatch.setitem(eager.COMPILED.__dict__, name, getattr(eager.EAGER, name))


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode, Copies(), torch.no_grad():
        yield mode


def parameters() -> list[nn.Parameter]:
    params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in ((6, 5), (), (70_000,))]
    params.append(nn.Parameter(torch.empty(4, 3, device="cuda", dtype=torch.bfloat16)))
    for param in params:
        param.grad = torch.empty_like(param)
    return params


OPTIONS: list[dict[str, Any]] = [
    {"lr": "tensor"},
    {"lr": "tensor", "collect_stats": True, "on_nonfinite": "skip", "weight_decay": 0.1},
    {"lr": "cpu tensor", "collect_stats": True, "on_nonfinite": "skip"},
    {"collect_stats": True, "on_nonfinite": "skip", "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"clip_accumulator": True, "on_nonfinite": "skip"},
    {"preset": "tfrs", "lambda_acc": 0.1, "collect_stats": True},
    {"by": "unit", "collect_stats": True},
]

KNOWN = {name: {*optim.get_info(name).all_hyperparameters, "collect_stats", "on_nonfinite"} for name in NAMES}
CASES = [
    (name, backend, options)
    for name in NAMES
    for backend, tried in (
        ("auto", OPTIONS),
        ("compiled", [OPTIONS[0], *OPTIONS[2:4]]),
    )
    for options in tried
    if set(options) <= KNOWN[name]
]


@pytest.mark.usefixtures("_cuda_build")
@pytest.mark.parametrize(("name", "backend", "options"), CASES, ids=str)
def test_a_step_on_cuda_mixes_no_devices_and_asks_for_no_number(
    name: str, backend: str, options: dict[str, Any], fake: FakeTensorMode
) -> None:
    options = {"lr": 0.1, **options}
    cpu_numbers = options["lr"] == "cpu tensor"
    if isinstance(options["lr"], str):
        options["lr"] = torch.full((), 0.1, device="cpu" if cpu_numbers else "cuda")
    optimizer = optim.build_optimizer(name, parameters(), backend=backend, **options)
    with Watch(cpu_numbers=cpu_numbers) as watch:
        optimizer.step()
        optimizer.step()
        if "collect_stats" in options:
            optimizer.last_step()
            optim.what_if(optimizer, ["agc", "lamb", "clippy"], read=False)
    assert not any("_local_scalar_dense" in called for called in watch.names)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert all(value.device.type == "cuda" for value in states)


@pytest.mark.usefixtures("_cuda_build")
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(("name", "given"), [("adagrad", {}), ("clippy", {"lambda_abs": 0.5})])
def test_where_sigma_is_1_for_certain_one_fused_kernel_steps_all_tensors(
    name: str, given: dict[str, Any], tensor_lr: bool, fake: FakeTensorMode
) -> None:
    params = parameters()[:-1]  # the kernel takes no state that is wider than its parameter
    lr = torch.full((), 0.1, device="cuda") if tensor_lr else 0.1
    optimizer = optim.build_optimizer(name, params, lr=lr, **given)
    with Watch():
        optimizer.step()
    with Watch() as watch:
        optimizer.step()
    fused = name == "adagrad" or not tensor_lr  # with a tensor lr, Clippy cannot know that nothing clips
    assert watch.names.count("_fused_adagrad_") == int(fused)
    assert (len(watch.names) < 15) is fused


def test_without_the_kernel_the_step_runs_in_plain_torch(fake: FakeTensorMode) -> None:
    optimizer = optim.build_optimizer("adagrad", parameters(), lr=0.1)
    with Watch() as watch:
        optimizer.step()
    assert "_fused_adagrad_" not in watch.names
    assert "add_" in watch.names


def test_the_trace_notices_a_step_that_waits(fake: FakeTensorMode) -> None:
    optimizer = optim.build_optimizer("gc", parameters(), lr=0.1, on_nonfinite="raise")  # which must wait
    with pytest.raises(DataDependentOutputException), Watch():
        optimizer.step()


def test_the_trace_notices_mixed_devices(fake: FakeTensorMode) -> None:
    with pytest.raises(AssertionError, match="cpu"), Watch():
        torch.where(torch.ones(3, device="cuda") > 0, torch.ones(3), 0.0)
