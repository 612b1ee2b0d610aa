"""Exponential moving average of the dense weights, for evaluation and serving; training itself does not see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

_TABLES = "embeddings."


class WeightAverage:
    """The average of all parameters but the embedding tables.

        a <- decay a + (1 - decay) w        after each optimizer step; a = w at the start

    Tables are left out, because a row changes only when its id occurs, and an average over steps would be an average
    over different times for each row. They are also what is large.

    Args:
        net: the net; its parameters are averaged.
        decay: between 0 and 1; 0.999 is a memory of about 1000 steps.

    Attributes:
        swapped: whether the net has the average in place of its own weights.

    Source: Polyak and Juditsky (1992), Acceleration of Stochastic Approximation by Averaging; the update is torch's
    (``torch.optim.swa_utils``).
    """

    def __init__(self, net: nn.Module, *, decay: float) -> None:
        self._live = {name: p for name, p in net.named_parameters() if not name.startswith(_TABLES)}
        self._update = get_ema_multi_avg_fn(decay)
        self._weights: dict[str, Tensor] = {}
        self.swapped = False
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Starts from the net's weights as they are now."""
        self._weights = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after an optimizer step."""
        average = [self._weights[name] for name in self._live]
        self._update(average, [p.detach() for p in self._live.values()], 0)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lets the net have the average in this block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the average and the net's own weights."""
        for name, parameter in self._live.items():
            own = parameter.detach().clone()
            parameter.copy_(self._weights[name])
            self._weights[name].copy_(own)
        self.swapped = not self.swapped

    def state_dict(self) -> dict[str, Tensor]:
        """The average by name of the parameter, wherever it is now."""
        if self.swapped:
            return {name: p.detach() for name, p in self._live.items()}
        return dict(self._weights)

    def own_weights(self) -> dict[str, Tensor]:
        """The net's own weights by name, wherever they are now."""
        return dict(self._weights) if self.swapped else {name: p.detach() for name, p in self._live.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over an average. A parameter that it lacks, or has in another shape, starts from the net's weights."""
        for name, p in self._live.items():
            there = state.get(name)
            taken = p.detach() if there is None or there.shape != p.shape else there
            self._weights[name] = taken.to(p.device, p.dtype, copy=True)
