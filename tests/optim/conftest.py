"""Fixtures of the tests of optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import optim


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> nn.Module:
    """An embedding, two layers and a head, as a ranker has them."""

    class Ranker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 4)
            self.shared = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
            self.head = nn.Linear(6, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.shared(self.table(ids).flatten(1)))

    return Ranker()


@pytest.fixture
def backward() -> Callable[..., torch.Tensor]:
    """One forward and backward of the ranker on random ids."""

    def run(model: nn.Module, scale: float = 1.0) -> torch.Tensor:
        loss = scale * model(torch.randint(0, 20, (16, 2))).square().mean()
        loss.backward()
        return loss

    return run


@pytest.fixture
def step_once() -> Callable[..., tuple[torch.Tensor, optim.SigmaOptimizer]]:
    """One step of one tensor: (weight before, gradient) -> (weight after, optimizer)."""

    def run(name: str, weight: torch.Tensor, grad: torch.Tensor, **given: Any) -> tuple[torch.Tensor, Any]:
        parameter = nn.Parameter(weight.clone())
        parameter.grad = grad.clone()
        optimizer = optim.build_optimizer(name, [("w", parameter)], **{"collect_stats": True, **given})
        optimizer.step()
        return parameter.detach(), optimizer

    return run
