"""Plain gradient descent: r_t = g_t, no state."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.reductions import Settings
from optim.updates.base import Direction


class GradientDescent:
    """The gradient itself is the direction."""

    name = "sgd"
    hyperparameters: tuple[Hyperparameter, ...] = ()

    def init(self, _weight: Tensor, _settings: Settings) -> dict[str, Tensor]:
        """Return no state."""
        return {}

    def direction(self, grad: Tensor, _state: Mapping[str, Tensor], _settings: Settings) -> Direction:
        """Return g_t."""
        return Direction(grad, None)

    def advance(self, _grad: Tensor, _state: Mapping[str, Tensor], _settings: Settings) -> dict[str, Tensor]:
        """Return no state."""
        return {}


SGD = GradientDescent()
