"""The tensors that `bench_optim.py` steps: weights in the shapes of the paper's models, and their gradients."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import nn

INPUT = 1628  # inputs of the Large models, so that their parameters come to the paper's 57.0 and 68.0 million
LAYER = [(4096, 4096), (4096,)]
SETS: dict[str, list[tuple[int, ...]]] = {
    "small": [(512, 14136), (512,), (512, 512), (512,), (6, 512), (6,)],
    "large": [(4096, INPUT), (4096,), *LAYER * 3, (6, 4096), (6,)],
}
SETS["large_dcn"] = [*[(INPUT, INPUT), (INPUT,)] * 4, (INPUT,), (INPUT,), *SETS["large"]]


def tensors(shapes: Iterable[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    """Return weights initialised as a network's."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        weight = torch.randn(shape, generator=generator, device=device) / max(1, shape[-1]) ** 0.5
        params.append(nn.Parameter(weight if len(shape) > 1 else torch.zeros(shape, device=device)))
    return params


class Gradients:
    """Normal gradients of one scale, different ones at every call, at no cost.

    The same gradients in every round would drive the weights away and make all coordinates of r = g / sqrt(G) alike,
    which does not happen in training. Drawing new ones would take longer than the step. Each tensor's gradient is
    therefore a window, at another place every time, of numbers that were drawn once.
    """

    PLACES, ALIGNED = 4096, 16  # windows, and numbers from one to the next: a cache line

    def __init__(self, params: Sequence[nn.Parameter], scale: float) -> None:
        generator = torch.Generator(params[0].device).manual_seed(1)
        spare = self.PLACES * self.ALIGNED
        self._pools = [
            torch.randn(param.numel() + spare, generator=generator, device=param.device) * scale for param in params
        ]
        self._params, self._draw = params, random.Random(1)
        self()

    def __call__(self) -> None:
        """Give every tensor a different gradient."""
        for param, pool in zip(self._params, self._pools, strict=True):
            begin = self._draw.randrange(self.PLACES) * self.ALIGNED
            param.grad = pool[begin : begin + param.numel()].view(param.shape)


def turn(params: Iterable[nn.Parameter]) -> None:
    """Negate gradients that a model left. The same in every round would drive the weights away."""
    torch._foreach_neg_([param.grad for param in params if param.grad is not None])
