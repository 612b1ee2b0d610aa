"""What a rule may know of a tensor: numbers reduced over its coordinates.

A reduction maps every coordinate to a number and combines the numbers by a sum of squares or by a maximum. Both have
the identity 0 and can be taken over chunks, rows or shards in any order, so the same definition serves a small bias,
a 10^7-row table of which three rows were touched, and a matrix spread over a hundred devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

Settings = Mapping[str, Any]
"""The hyperparameters of one parameter group, `lr` included."""


class Coordinates(NamedTuple):
    """The coordinates of one tensor, or of a piece of it, all of one shape.

    Attributes:
        weight: w, before the step.
        grad: g, the gradient as the update sees it (sign and coupled weight decay included).
        update: r, what the step would be at learning rate 1 and sigma 1.
        scale: r / g, the inverse root of the accumulator; None for an update that has none.
    """

    weight: Tensor
    grad: Tensor
    update: Tensor
    scale: Tensor | None


@dataclass(frozen=True, slots=True)
class Reduction:
    """One number a tensor: a 2-norm (`combine="norm"`) or a maximum of non-negative values (`combine="max"`)."""

    name: str
    combine: Literal["norm", "max"]
    map: Callable[[Coordinates, Settings], Tensor]


GRAD_NORM = Reduction("grad_norm", "norm", lambda at, _: at.grad)
WEIGHT_NORM = Reduction("weight_norm", "norm", lambda at, _: at.weight)
UPDATE_NORM = Reduction("update_norm", "norm", lambda at, _: at.update)
UPDATE_MAX = Reduction("update_max", "max", lambda at, _: at.update.abs())
