"""Dead ReLUs: units that are 0 for every row, through which nothing flows and nothing is learned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RELUS: frozenset[Callable[..., Any]] = frozenset(
    {F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
)


class DeadReluShare:
    """Share of units behind a ReLU that are 0 for every row of a batch, by layer.

        peak_h = max_b relu(z_bh);   share = (units h with peak_h = 0) / H

    Sees calls of the function, not modules: models here (and most) call ``F.relu`` in a loop over layers. A layer is
    named after the module that calls and a count, ``bottom.0``, ``bottom.1``.

    Looks only inside ``with share.measuring():``; a step that is not measured costs nothing. One reduction a layer, no
    waiting for the device. It does not see into a net compiled by torch.compile: measure the net itself.

    A batch of few rows finds units dead that are only rare; 1,000 rows tell.

    Args:
        net: the network.
        layers: names of the only ones to look at; None for all.
    """

    def __init__(self, net: nn.Module, *, layers: Collection[str] | None = None) -> None:
        self._net = net
        self._layers = layers
        self._callers: list[str] = []
        self._counts: dict[str, int] = {}
        self._peaks: dict[str, Tensor] = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Looks at the forward passes inside; what an earlier one showed is forgotten."""
        self._peaks, self._counts = {}, {}
        handles = []
        for name, module in self._net.named_modules():
            handles.append(module.register_forward_pre_hook(self._entered(name)))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        try:
            with _ReluMode(self._saw):
                yield
        finally:
            self._callers.clear()
            for handle in handles:
                handle.remove()

    def peaks(self) -> dict[str, Tensor]:
        """Largest output of each unit, [H] on the device by layer, of the last measurement."""
        return dict(self._peaks)

    def compute(self) -> dict[str, Tensor]:
        """The share as scalars on the device by layer, of the last measurement."""
        return {name: dead_share(peak_H) for name, peak_H in self._peaks.items()}

    def _entered(self, name: str) -> Callable[[nn.Module, object], None]:
        def note(_module: nn.Module, _inputs: object) -> None:
            self._callers.append(name)

        return note

    def _left(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        if self._callers:
            self._callers.pop()

    @torch.no_grad()
    def _saw(self, output: Tensor) -> None:
        if not self._callers or not output.numel():
            return
        stem = f"{self._callers[-1]}." if self._callers[-1] else ""
        count = self._counts.get(stem, 0)
        self._counts[stem] = count + 1
        name = f"{stem}{count}"
        if self._layers is None or name in self._layers:
            units = output.detach().flatten(0, -2) if output.ndim > 1 else output.detach()[None]
            self._peaks[name] = units.amax(0)


def dead_share(peak_H: Tensor) -> Tensor:
    """Share of units whose largest output is 0, a scalar; one that is nan is not dead."""
    return (peak_H <= 0).float().mean()


class _ReluMode(TorchFunctionMode):
    def __init__(self, saw: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._saw = saw

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _RELUS:
            self._saw(output)
        return output
