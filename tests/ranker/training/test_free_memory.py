from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ranker.training import free_memory
from ranker.training.free_memory import FreeMemory


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _fragmented() -> list[torch.Tensor]:
    """100 MB that are free between small blocks that stay, where the heap's end is in use."""
    blocks = [torch.ones(16_384) for _ in range(1_600)]  # of 64 KiB, below the size that has pages of its own
    return blocks[::16]


@pytest.mark.skipif(free_memory._trim() is None, reason="the C library is not glibc")
def test_free_blocks_between_others_go_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FreeMemory, "_last", float("inf"))
    kept = _fragmented()
    FreeMemory.release()
    held = _resident()

    monkeypatch.setattr(FreeMemory, "_last", float("-inf"))
    FreeMemory.release()

    assert held - _resident() > 50e6
    assert all(bool((block == 1).all()) for block in kept)


def test_it_is_done_once_in_a_while_for_all_runs_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    done, now = [], [100.0]
    monkeypatch.setattr(free_memory, "_trim", lambda: done.append)
    monkeypatch.setattr(free_memory.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(FreeMemory, "_last", 100.0)
    for _ in range(30):
        now[0] += 1.5
        FreeMemory.release()
        FreeMemory.release()
    assert done == [0, 0]


def test_a_run_asks_for_it_after_each_step(fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr(FreeMemory, "release", lambda: asked.append(None))
    assert len(asked) == 0
    trainer = fit()
    assert len(asked) == trainer.global_step > 0
