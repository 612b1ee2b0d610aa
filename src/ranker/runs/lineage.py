"""What a run continues: the run before it, and how much it and all before it were trained on."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

LINEAGE = "lineage"  # in a checkpoint and in export.json: steps, windows and rows in all, and the last row's time
PARENT = "warm_start.parent"  # in the configuration


def totals(
    *, steps: int, windows: int, rows: int, last_time_ms: int | None, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What stands in a checkpoint of a run about it and the runs before it.

    Args:
        steps: optimizer steps of the run.
        windows: windows of all runs.
        rows: rows of the run.
        last_time_ms: time of the last row that was trained on.
        before: the same of the run that it continues, or nothing.
    """
    earlier = before or {}
    return {
        "steps": int(earlier.get("steps", 0)) + steps,
        "windows": windows,
        "rows": int(earlier.get("rows", 0)) + rows,
        "own_rows": rows,
        "last_time_ms": earlier.get("last_time_ms") if last_time_ms is None else last_time_ms,
    }


def parent(cfg: DictConfig) -> dict[str, Any] | None:
    """What a run continues, from its configuration; None where it began with random weights."""
    found = OmegaConf.select(cfg, PARENT)
    return None if found is None else OmegaConf.to_container(found, resolve=True)  # type: ignore[return-value]


def steps_before(cfg: DictConfig) -> int:
    """Optimizer steps of the runs before this one."""
    return int((parent(cfg) or {}).get("steps", 0))


def iso(time_ms: int | None) -> str | None:
    """A time as text, UTC."""
    return None if time_ms is None else dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).isoformat()
