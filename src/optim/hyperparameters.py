"""Descriptions of hyperparameters, and the checks that refuse a wrong one in a single clear line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameter:
    """One argument of a method: what it means and which values it may take.

    The kind follows from the default: a bool is a switch, a tuple a fixed number of numbers, a string one of
    `choices`, anything else a number in [low, high].
    """

    name: str
    default: Any
    doc: str
    unit: str = "none"
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """The values it may take, for people: `(0, inf)`, `true | false`, `current | delayed`."""
        if self.choices:
            return " | ".join(self.choices)
        if isinstance(self.default, bool):
            return "true | false"
        left = "(" if self.low_open or math.isinf(self.low) else "["
        right = ")" if self.high_open or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    def check(self, value: Any, where: str) -> Any:
        """Return the value as the optimizer stores it.

        Raises:
            TypeError: the value is of another kind (a string for a number, a number for a switch).
            ValueError: the value is out of range or not one of the choices.
        """
        if self.choices:
            return self._check_choice(value, where)
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise TypeError(f"{where}: {self.name} must be true or false, got {value!r}")
            return value
        if isinstance(self.default, tuple):
            return self._check_tuple(value, where)
        return self._check_number(value, where)

    def _check_choice(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{where}: {self.name} must be one of {', '.join(self.choices)}, got {value!r}")
        if value not in self.choices:
            raise ValueError(f"{where}: {self.name} must be one of {', '.join(self.choices)}, got {value!r}")
        return value

    def _check_tuple(self, value: Any, where: str) -> tuple[float, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != len(self.default):
            raise TypeError(f"{where}: {self.name} must be {len(self.default)} numbers, got {value!r}")
        return tuple(self._check_number(number, where) for number in value)

    def _check_number(self, value: Any, where: str) -> Any:
        if isinstance(value, torch.Tensor):
            # A tensor's value lives on its device; looking at it here would be the host synchronisation we avoid.
            if self.name != "lr" or value.numel() != 1:
                raise TypeError(f"{where}: {self.name} must be a number, got a tensor of shape {tuple(value.shape)}")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{where}: {self.name} must be a number, got {value!r}")
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        if not (above and below) or math.isnan(value):
            raise ValueError(f"{where}: {self.name} must be in {self.range}, got {value!r}")
        return float(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names come closest to a misspelt one; all of them when none comes close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"


def check_names(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse arguments that a method does not have.

    Raises:
        TypeError: an argument is unknown; the message names the nearest valid ones.
    """
    valid = set(known)
    for name in given:
        if name not in valid:
            raise TypeError(f"{where}: unknown hyperparameter {name!r}; {nearest(str(name), valid)}")


LR = Hyperparameter(name="lr", default=1e-2, low=0.0, unit="per step", doc="Learning rate eta; a number or a tensor.")

# Every method understands these, whatever its update and its rule.
COMMON: tuple[Hyperparameter, ...] = (
    LR,
    Hyperparameter(name="weight_decay", default=0.0, low=0.0, unit="1", doc="Decay of the weights towards 0."),
    Hyperparameter(
        name="decoupled_weight_decay",
        default=False,
        doc="True: w <- (1 - lr * weight_decay) * w beside the step, as in AdamW. False: g <- g + weight_decay * w.",
    ),
    Hyperparameter(name="maximize", default=False, doc="Ascend instead of descend."),
    Hyperparameter(
        name="sparse_sigma",
        default="table",
        choices=("table", "row"),
        doc="One sigma for all touched rows of a sparse gradient (the authors' way), or one a row.",
    ),
)

# These belong to the optimizer as a whole: every group has the same value.
SHARED: tuple[Hyperparameter, ...] = (
    Hyperparameter(
        name="on_nonfinite",
        default="propagate",
        choices=("propagate", "skip", "raise"),
        doc="What an infinite or NaN gradient does: pass through, skip the whole step and count it, or raise.",
    ),
    Hyperparameter(name="collect_stats", default=False, doc="Keep what `clip_stats()` reports, on the device."),
    Hyperparameter(
        name="backend",
        default="auto",
        choices=("auto", "native", "eager"),
        doc="How tensors are stepped: by C kernels on the CPU, or by plain torch; auto: C where a compiler is found.",
    ),
)
