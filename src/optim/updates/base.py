"""The interface of an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.reductions import Settings


class Direction(NamedTuple):
    """What an update makes of a gradient.

    Attributes:
        update: r, same shape as the gradient.
        scale: r / g where the update is a diagonal scaling of g (Adagrad), else None.
    """

    update: Tensor
    scale: Tensor | None


class Update(Protocol):
    """A pure description of an update: no tensor it is given is ever written to.

    A step looks at the direction first (to choose sigma) and advances the state afterwards, or not at all when the
    gradient is not finite; all three functions therefore only compute.
    """

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:
        """Its own, beside the common ones."""
        ...

    def init(self, weight: Tensor, settings: Settings, /) -> dict[str, Tensor]:
        """Return the state of a fresh parameter: tensors shaped like it, and 0-d tensors for counts."""
        ...

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], settings: Settings, /) -> Direction:
        """Return the direction for this gradient and this state."""
        ...

    def advance(self, grad: Tensor, state: Mapping[str, Tensor], settings: Settings, /) -> dict[str, Tensor]:
        """Return the state after this gradient."""
        ...
