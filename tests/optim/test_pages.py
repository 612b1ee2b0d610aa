"""State in huge pages: asked for where it is large, and nowhere else; without them, everything works."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optim
from optim import pages

SMAPS = Path("/proc/self/smaps")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_linux = pytest.mark.skipif(
    sys.platform != "linux" or not HUGE_PAGES.exists() or not SMAPS.exists(),
    reason="this system has no transparent huge pages",
)
LARGE, SMALL = (1100, 4096), (100, 100)  # 18 MB; 40 kB


def is_asked_for(tensor: Tensor) -> bool:
    """Whether the middle of a tensor lies in memory for which huge pages were asked."""
    middle, here = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2, False
    for line in SMAPS.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and ":" not in first:
            begin, end = (int(number, 16) for number in first.split("-"))
            here = begin <= middle < end
        elif here and first == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError("no mapping holds the tensor")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the system is asked for: (first byte, number of bytes)."""
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda start, size: ranges.append((start, size)))
    return ranges


def lies_in(tensor: Tensor, ranges: list[tuple[int, int]]) -> bool:
    """Whether a tensor's memory meets any of these ranges."""
    begin = tensor.data_ptr()
    return any(begin < start + size and start < begin + 4 * tensor.numel() for start, size in ranges)


def stepped(name: str, shape: tuple[int, int], sparse: bool = False) -> tuple[nn.Parameter, optim.SigmaOptimizer]:
    param = nn.Parameter(torch.ones(shape))
    param.grad = torch.ones(shape)
    if sparse:
        rows = torch.tensor([[3, 90, 3]])
        param.grad = torch.sparse_coo_tensor(rows, torch.ones(3, shape[1]), shape, check_invariants=True)
    optimizer = optim.build_optimizer(name, [("w", param)], lr=0.1)
    optimizer.step()
    return param, optimizer


@needs_linux
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["clippy", "clippy_adam"])
def test_large_state_is_put_in_huge_pages(name: str, sparse: bool) -> None:
    param, optimizer = stepped(name, LARGE, sparse)
    tensors = [value for value in optimizer.state[param].values() if value.ndim]
    assert tensors
    assert all(is_asked_for(value) for value in tensors)


def test_so_is_state_from_a_checkpoint(asked: list[tuple[int, int]]) -> None:
    param, optimizer = stepped("clippy", LARGE)
    saved = copy.deepcopy(optimizer.state_dict())
    asked.clear()
    optimizer.load_state_dict(saved)
    assert lies_in(optimizer.state[param]["sum"], asked)


def test_weights_gradients_and_small_state_are_left_alone(asked: list[tuple[int, int]]) -> None:
    param, _ = stepped("clippy", LARGE)
    assert param.grad is not None
    assert len(asked) == 1
    assert not lies_in(param, asked)
    assert not lies_in(param.grad, asked)
    stepped("clippy", SMALL)
    assert len(asked) == 1


def test_memory_beyond_the_tensor_is_left_alone(asked: list[tuple[int, int]]) -> None:
    tensor = torch.empty(LARGE)
    pages.ask_for_huge_pages(tensor)
    [(start, size)] = asked
    assert start % pages.HUGE == size % pages.HUGE == 0
    assert tensor.data_ptr() <= start
    assert start + size <= tensor.data_ptr() + 4 * tensor.numel()
    assert size > 4 * tensor.numel() - 2 * pages.HUGE


@pytest.mark.parametrize("answer", [None, lambda _start, _size: -1], ids=["no huge pages", "a refusal"])
def test_a_step_is_the_same_without(answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = stepped("clippy", LARGE)
    monkeypatch.setattr(pages, "_madvise", lambda: answer)
    param, _ = stepped("clippy", LARGE)
    assert param.equal(expected)
