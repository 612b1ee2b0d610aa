"""One optimizer over the parameters of all replicas, with the settings and the learning rate of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_UNSET = ("params", "param_names", "initial_lr")
_ELEMENTWISE = "adagrad"  # the method whose step of a row depends on this row alone


@dataclass
class _Group:
    """Parameters of several replicas that are stepped with the same settings.

    Attributes:
        settings: the parameter group of the optimizer.
        base_lr: learning rate after the warm-up.
        warmup: steps of the warm-up.
    """

    settings: dict[str, Any]
    base_lr: float
    warmup: int


class StackedOptimizer:
    """The optimizers of the replicas as one, so that equal settings share the calls of the kernels.

    Every parameter keeps its own state, and every reduction (a norm, a maximum) is over one tensor of one replica, as
    the rules define it. Nothing of one replica reaches another.

    Args:
        optimizers: one for each replica, of this project's package.
        warmups: steps over which each replica's learning rate rises from lr / steps to lr; 0 for none.

    Attributes:
        optimizer: the joined optimizer; its state is by parameter, as that of a run alone.
    """

    def __init__(self, optimizers: Sequence[Optimizer], warmups: Sequence[int]) -> None:
        joined: dict[str, tuple[dict[str, Any], int]] = {}
        self._first: list[str] = []
        for optimizer, warmup in zip(optimizers, warmups, strict=True):
            for number, group in enumerate(optimizer.param_groups):
                settings = {name: value for name, value in group.items() if name not in _UNSET}
                key = repr((sorted(settings.items(), key=lambda item: item[0]), warmup))
                joined.setdefault(key, ({**settings, "params": []}, warmup))[0]["params"] += group["params"]
                if number == 0:
                    self._first.append(key)
        defaults = optimizers[0].defaults
        make: Any = type(optimizers[0])  # ranker does not import optim
        groups = [settings for settings, _ in joined.values()]
        self.optimizer: Optimizer = make(
            groups[0]["params"], defaults["method"], lr=defaults["lr"], backend=defaults["backend"], collect_stats=False
        )
        self.optimizer.param_groups = groups  # as they were checked and completed for each replica
        self._groups = {
            key: _Group(group, group["lr"], warmup)
            for (key, (_, warmup)), group in zip(joined.items(), self.optimizer.param_groups, strict=True)
        }

    def step(self) -> None:
        """Steps every parameter that has a gradient."""
        self.optimizer.step()

    def set_rates(self, step: int) -> None:
        """Sets the learning rates of the step after ``step`` steps, as the schedule of a run alone does."""
        for group in self._groups.values():
            if group.warmup:
                group.settings["lr"] = group.base_lr * min(1.0, (step + 1) / group.warmup)

    def rate_of(self, replica: int) -> float:
        """The learning rate of a replica's first parameter group."""
        return float(self._groups[self._first[replica]].settings["lr"])

    def keep(self, replicas: Sequence[int], dropped: Sequence[Tensor]) -> None:
        """Forgets the parameters of the other replicas."""
        gone = {id(parameter) for parameter in dropped}
        for parameter in dropped:
            self.optimizer.state.pop(parameter, None)
        for group in self._groups.values():
            kept = [parameter for parameter in group.settings["params"] if id(parameter) not in gone]
            group.settings["params"] = kept
            group.settings.pop("param_names", None)
        self._first = [self._first[k] for k in replicas]


def table_starts(optimizer: Optimizer, tables: dict[int, Tensor]) -> dict[int, float] | str:
    """The initial accumulator of each table, or why the tables cannot be stepped by their touched rows.

    Args:
        optimizer: that of one replica.
        tables: the embedding tables by width.
    """
    starts = {}
    for dim, table in tables.items():
        group = next(g for g in optimizer.param_groups if any(p is table for p in g["params"]))
        if group.get("method") != _ELEMENTWISE:
            return f"embedding tables are trained by {group.get('method')}, which looks at whole tables"
        if group.get("weight_decay"):
            return "embedding tables have a weight decay, which moves every row at every step"
        starts[dim] = float(group["initial_accumulator_value"])
    return starts


def unlike(net: torch.nn.Module) -> str:
    """Why a net cannot be stacked: it keeps a state that is no weight; empty if it can."""
    extra = sorted(set(net.state_dict()) - {name for name, _ in net.named_parameters()})
    return f"the model keeps a state beside its weights: {', '.join(extra)}" if extra else ""
