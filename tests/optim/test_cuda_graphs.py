"""What a CUDA graph requires: the same kernels on the same memory whatever the numbers; and a captured graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optim

NAMES = optim.list_optimizers()
GIVEN: dict[str, Any] = {"collect_stats": True, "on_nonfinite": "skip", "backend": "eager"}


def make(name: str, device: str = "cpu") -> tuple[list[nn.Parameter], optim.SigmaOptimizer]:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(shape, generator=generator) for shape in ((6, 5), (5,))]
    params = [nn.Parameter(weight.to(device)) for weight in weights]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params, optim.build_optimizer(name, params, lr=torch.tensor(0.1, device=device), **GIVEN)


def fill(params: list[nn.Parameter], seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        assert param.grad is not None
        param.grad.copy_(torch.randn(param.shape, generator=generator) * scale)


class Recorder(TorchDispatchMode):
    """The operations of a step, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_runs_the_same_operations_whatever_the_numbers_are(name: str) -> None:
    params, optimizer = make(name)
    fill(params, 0, 1.0)
    optimizer.step()
    seen = []
    for seed, scale in ((1, 1e-6), (2, 1e3), (3, torch.nan), (4, 0.0)):
        fill(params, seed, scale)
        optimizer.param_groups[0]["lr"].mul_(0.5)
        with Recorder() as recorder:
            optimizer.step()
        seen.append(recorder.names)
    assert all(names == seen[0] for names in seen[1:])


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_step_keeps_stays_where_it_is(name: str) -> None:
    params, optimizer = make(name)

    def places() -> list[int]:
        states = [tensor for param in params for tensor in optimizer.state[param].values()]
        counts = [
            value for group in optimizer.param_groups for value in group.values() if isinstance(value, torch.Tensor)
        ]
        return [tensor.data_ptr() for tensor in (*params, *states, *counts)]

    fill(params, 0, 1.0)
    optimizer.step()
    before = places()
    for seed, scale in ((1, 1.0), (2, torch.nan), (3, 1.0)):
        fill(params, seed, scale)
        optimizer.step()
    assert places() == before
    assert optimizer.skipped_steps == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_replays_as_plain_steps(name: str) -> None:
    (plain, first), (captured, second) = make(name, "cuda"), make(name, "cuda")
    side = torch.cuda.Stream()
    for params, optimizer in ((plain, first), (captured, second)):
        fill(params, 0, 1.0)
        with torch.cuda.stream(side):  # warm up: the state must exist before the capture
            optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        second.step()
    for seed, scale in ((1, 1e-3), (2, 1e3), (3, torch.nan), (4, 1.0)):
        for params, optimizer, go in ((plain, first, first.step), (captured, second, graph.replay)):
            fill(params, seed, scale)
            optimizer.param_groups[0]["lr"].fill_(0.1 * seed)
            go()
    assert second.skipped_steps == first.skipped_steps == 1
    for mine, theirs in zip(captured, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
