"""Trains one small multitask network twice: with Adagrad the loss diverges, with Clippy it falls. Takes under 10 s.

    PYTHONPATH=src python examples/adagrad_diverges_clippy_does_not.py

The network has what makes ranking models unstable: a shared bottom, two tasks, inputs whose distribution drifts, and a
learning rate that is too large where the loss surface is steep. Everything except the optimizer's name is the same in
both runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import optim

STEPS, BATCH, INPUTS, WIDTH, LR = 300, 256, 32, 64, 1.0


def stream(step: int, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs [B, F] whose mean drifts with the step, and labels [B, T]: a click and a watch time."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, INPUTS, generator=generator) + math.sin(step / 40)
    scores = inputs @ directions
    return inputs, torch.stack([(scores[:, 0] > 0).float(), scores[:, 1]], dim=1)


def train(name: str) -> list[float]:
    """Return the loss at every step."""
    torch.manual_seed(0)
    directions = torch.randn(INPUTS, 2) / INPUTS**0.5
    layers = [nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(WIDTH, 2))
    optimizer = optim.build_optimizer(name, model, lr=LR)
    losses = []
    for step in range(STEPS):
        inputs, labels = stream(step, directions)
        logits = model(inputs)
        click = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0])
        loss = click + nn.functional.mse_loss(logits[:, 1], labels[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Print both runs side by side."""
    runs = {name: train(name) for name in ("adagrad", "clippy")}
    print(f"{'step':>6} {'adagrad':>12} {'clippy':>12}")
    for step in (0, 1, 2, 5, 10, 30, 100, 200, STEPS - 1):
        print(f"{step:>6} {runs['adagrad'][step]:>12.4g} {runs['clippy'][step]:>12.4g}")
    for name, losses in runs.items():
        print(f"{name}: worst {max(losses):.4g}, mean of the last 50 {sum(losses[-50:]) / 50:.4g}")


if __name__ == "__main__":
    main()
