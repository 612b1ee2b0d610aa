"""Descriptions of hyperparameters, and the checks that refuse a wrong value with a one-line message."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameter:
    """One argument of a method: what it means and which values it may take.

    The default decides the type: a bool is a switch, a tuple a fixed number of numbers, a string one of `choices`,
    anything else a number in [low, high].
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
        """The allowed values as text: `(0, inf)`, `true | false`, `current | delayed`."""
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
            TypeError: the value has the wrong type (a string for a number, a number for a switch).
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
            # A tensor's value is on its device. Reading it here would wait for the device.
            if self.name != "lr" or value.numel() != 1:
                raise TypeError(f"{where}: {self.name} must be a number, got a tensor of shape {tuple(value.shape)}")
            return value
        if isinstance(value, bool) or not isinstance(value, Real):  # numpy scalars are
            raise TypeError(f"{where}: {self.name} must be a number, got {value!r}")
        number = float(value)
        above = number > self.low if self.low_open else number >= self.low
        below = number < self.high if self.high_open else number <= self.high
        if not (above and below) or math.isnan(number):
            raise ValueError(f"{where}: {self.name} must be in {self.range}, got {value!r}")
        return number


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known names closest to a misspelt one, or all of them when none is close."""
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
        doc="True: w <- (1 - lr * weight_decay) * w, as in AdamW. False: g <- g + weight_decay * w; "
        "for lamb_adam r <- r + weight_decay * w, as published.",
    ),
    Hyperparameter(name="maximize", default=False, doc="Ascend instead of descend."),
    Hyperparameter(
        name="sparse_sigma",
        default="table",
        choices=("table", "row"),
        doc="One sigma for all touched rows of a sparse gradient (as in the authors' code), or one per row.",
    ),
)

# These belong to the optimizer as a whole, not to a group.
SHARED: tuple[Hyperparameter, ...] = (
    Hyperparameter(
        name="on_nonfinite",
        default="propagate",
        choices=("propagate", "skip", "raise"),
        doc="What a gradient does that is infinite, NaN, or too large for its square to be finite (1.8e19 in float32): "
        "pass through, skip the whole step and count it, or raise.",
    ),
    Hyperparameter(name="collect_stats", default=False, doc="Keep the report of `clip_stats()`, on the device."),
    Hyperparameter(
        name="backend",
        default="auto",
        choices=("auto", "native", "eager", "compiled"),
        doc="native: C kernels on the CPU. eager: plain torch, any device. compiled: torch.compile, any device. "
        "auto: C kernels where they apply and a C compiler is found, else plain torch.",
    ),
)
