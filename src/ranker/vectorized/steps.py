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
        settings: the parameter group of the joined optimizer.
        own: the parameter groups of the replicas' own optimizers, whose learning rates are always the same.
    """

    settings: dict[str, Any]
    own: list[dict[str, Any]]


class StackedOptimizer:
    """The optimizers of the replicas as one, so that equal settings share the calls of the kernels.

    Every parameter keeps its own state, and every reduction (a norm, a maximum) is over one tensor of one replica, as
    the rules define it. Nothing of one replica reaches another. The replicas' own optimizers do not step. They hold
    the same state, and their learning rates, which their own schedules move, are those of the step.

    Args:
        optimizers: one for each replica, of this project's package; what they have as state is taken over.
        warmups: steps over which each replica's learning rate rises from lr / steps to lr; 0 for none.

    Attributes:
        optimizer: the joined optimizer; its state is by parameter, as that of a run alone.
    """

    def __init__(self, optimizers: Sequence[Optimizer], warmups: Sequence[int]) -> None:
        joined: dict[str, _Group] = {}
        for optimizer, warmup in zip(optimizers, warmups, strict=True):
            for group in optimizer.param_groups:
                settings = {name: value for name, value in group.items() if name not in _UNSET}
                key = repr((sorted(settings.items(), key=lambda item: item[0]), group.get("initial_lr"), warmup))
                found = joined.setdefault(key, _Group({**settings, "params": []}, []))
                found.settings["params"] += group["params"]
                found.own.append(group)
        self._groups, defaults = list(joined.values()), optimizers[0].defaults
        make: Any = type(optimizers[0])  # ranker does not import optim
        self.optimizer: Optimizer = make(
            self._groups[0].settings["params"],
            defaults["method"],
            lr=defaults["lr"],
            backend=defaults["backend"],
            collect_stats=defaults["collect_stats"],
        )
        # As they were checked and completed for each replica.
        self.optimizer.param_groups = [group.settings for group in self._groups]
        self._optimizers = list(optimizers)
        self._apart = [
            (optimizer, p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
        ]
        for optimizer in optimizers:
            self.optimizer.state.update(optimizer.state)
        self.share_state()

    def step(self) -> None:
        """Steps every parameter that has a gradient, at the learning rates of the replicas' own optimizers."""
        for group in self._groups:
            if group.own:
                group.settings["lr"] = group.own[0]["lr"]
        self.optimizer.step()

    def share_state(self) -> None:
        """Gives the replicas' own optimizers the state of those parameters that have made their first step."""
        apart, state = self._apart, self.optimizer.state
        self._apart = [(optimizer, p) for optimizer, p in apart if p not in state]
        for optimizer, p in apart if len(apart) > len(self._apart) else ():
            if p in state:
                optimizer.state[p] = state[p]

    def keep(self, replicas: Sequence[int]) -> None:
        """Forgets the parameters of the other replicas, whose own optimizers keep their state."""
        dropped = [optimizer for k, optimizer in enumerate(self._optimizers) if k not in replicas]
        groups = {id(group) for optimizer in dropped for group in optimizer.param_groups}
        gone = {id(p) for optimizer in dropped for group in optimizer.param_groups for p in group["params"]}
        for optimizer in dropped:
            for p in optimizer.state:
                self.optimizer.state.pop(p, None)
        for group in self._groups:
            group.settings["params"] = [p for p in group.settings["params"] if id(p) not in gone]
            group.own = [own for own in group.own if id(own) not in groups]
        self._optimizers = [self._optimizers[k] for k in replicas]
        self._apart = [(optimizer, p) for optimizer, p in self._apart if id(p) not in gone]


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
