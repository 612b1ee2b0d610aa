"""The options of daily training, typed; conf/daily explains each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ranker.config import ACCUMULATORS
from ranker.data.columns import from_plain
from ranker.errors import UserError, one_of

COMPLETE = ("later_rows", "marker", "delay")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """What changes from the configured run when a day is tried again. Changes do not add up over the tries.

    Attributes:
        lr_factor: multiplies the learning rate.
        accumulators: as ``warm_start.accumulators``; empty keeps the configured choice.
        optim: option of the group ``optim``; empty keeps the configured one.
    """

    lr_factor: float = 1.0
    accumulators: str = ""
    optim: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.lr_factor <= 1:
            raise UserError(f"daily.retries: lr_factor must be above 0 and at most 1, got {self.lr_factor}")
        if self.accumulators:
            one_of(self.accumulators, ACCUMULATORS, "daily.retries: accumulators")

    def __str__(self) -> str:
        """What changes, in words."""
        said = [f"lr x {self.lr_factor:g}"] if self.lr_factor != 1 else []
        said += [f"accumulators {self.accumulators}"] if self.accumulators else []
        said += [f"optim={self.optim}"] if self.optim else []
        return ", ".join(said) or "as configured"


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """How far from the past a day may be; see conf/daily."""

    days: int
    min_days: int
    sample_rows: int
    scale: float
    nulls: float
    label: float
    new_ids: float
    psi: float

    def __post_init__(self) -> None:
        for name in ("days", "min_days", "sample_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"daily.drift.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("scale", "label"):
            if not getattr(self, name) > 1:
                raise UserError(f"daily.drift.{name} is a factor above 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DailySettings:
    """The options of a call; see conf/daily."""

    dir: str
    first_day: str | None
    bootstrap_days: int
    start_from: str | None
    keep: int
    complete: str
    marker: str
    delay_hours: float
    retries: tuple[Retry, ...] = ()
    gate: str = "default"
    max_auc_drop: float
    onnx: bool
    on_drift: str
    drift: DriftSettings = field()

    def __post_init__(self) -> None:
        one_of(self.on_drift, ("warn", "stop"), "daily.on_drift")
        one_of(self.complete, COMPLETE, "daily.complete")
        if not self.marker.strip() or "/" in self.marker:
            raise UserError(f"daily.marker is the name of a file, such as _SUCCESS, got '{self.marker}'")
        if not (self.delay_hours >= 0 and math.isfinite(self.delay_hours)):
            raise UserError(f"daily.delay_hours must be 0 or more, got {self.delay_hours}")
        for name in ("bootstrap_days", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"daily.{name} must be 1 or more, got {getattr(self, name)}")

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> DailySettings:
        """From the composed group ``daily``.

        Raises:
            UserError: an option is unknown, of the wrong type or out of range.
        """
        retries = plain.get("retries") or []
        if not isinstance(retries, list):
            raise UserError("daily.retries must be a list, such as [{lr_factor: 0.5}]")
        parts = {
            **plain,
            "retries": tuple(from_plain(Retry, entry, f"daily.retries[{i}]") for i, entry in enumerate(retries)),
            "drift": from_plain(DriftSettings, plain.get("drift"), "daily.drift"),
        }
        return from_plain(cls, parts, "daily")
