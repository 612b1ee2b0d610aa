"""The hyperparameters of the optimizer of a running fit: as a checkpoint holds them, and changed on the way."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The hyperparameters of each group that are plain values, as a checkpoint can hold them."""
    return [
        {name: value for name, value in group.items() if name != "params" and _is_plain(value)}
        for group in optimizer.param_groups
    ]


def scale_lr(trainer: pl.Trainer, factor: float, *, group: int | None = None) -> None:
    """Multiplies the learning rate, now and in the schedule.

    Args:
        trainer: the trainer of a running fit.
        factor: above 0.
        group: number of the parameter group; None for all.
    """
    chosen = [number for number in range(len(trainer.optimizers[0].param_groups)) if group in (None, number)]
    for number in chosen:
        settings = trainer.optimizers[0].param_groups[number]
        for name in ("lr", "initial_lr"):
            if name in settings:
                settings[name] = settings[name] * factor
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs[number] = config.scheduler.base_lrs[number] * factor


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
