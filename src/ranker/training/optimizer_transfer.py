"""Takes over an optimizer's state, by parameter name: into another optimizer, or from a snapshot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ranker.training.touched_rows import sparse_tables

_REPORTS = ("clip_stats",)  # optimizer state that only reports; it is not transferred

StateByName = Mapping[str, Mapping[str, Tensor]]
"""State tensors by name of the parameter and of the quantity, such as Adagrad's ``sum``."""


def state_by_name(net: nn.Module, optimizer: Optimizer) -> StateByName:
    """The state tensors of an optimizer over the parameters of a net; they are not copied."""
    return {
        name: {
            key: value
            for key, value in optimizer.state.get(param, {}).items()
            if isinstance(value, Tensor) and key not in _REPORTS
        }
        for name, param in net.named_parameters()
    }


@torch.no_grad()
def initial_state(net: nn.Module, made: Optimizer) -> StateByName:
    """The state that an optimizer keeps per parameter, at its initial value, found by a step with zero gradients.

    A table with sparse gradients takes part with one row, so that no table is copied: what is kept for a row is the
    same for all rows.

    Args:
        net: its weights are as before afterwards; it has no gradients.
        made: a new optimizer over them, which is of no further use.
    """
    tables = {name: table.data for name, table in sparse_tables(net).items()}
    before = {name: value.clone() for name, value in net.state_dict().items() if name not in tables}
    for name, param in net.named_parameters():
        if name in tables:
            param.data = tables[name][:1].clone()
        param.grad = torch.zeros_like(param)
    made.step()
    found = {name: dict(values) for name, values in state_by_name(net, made).items() if values}
    for name, param in net.named_parameters():
        param.grad = None
        if name in tables:
            one, param.data = param.shape, tables[name]
            of_rows = {k: x.expand(param.shape) for k, x in found.get(name, {}).items() if x.shape == one}
            found.get(name, {}).update(of_rows)
    net.load_state_dict(before, strict=False)
    return found


@torch.no_grad()
def take_over(
    old: StateByName, net: nn.Module, optimizer: Optimizer, wanted: StateByName
) -> tuple[dict[str, int], dict[str, int]]:
    """Gives state to an optimizer, for each parameter whose quantities are the same in the same shapes.

    The tensors are not copied, because tables may be large: the optimizer that had them is of no further use.

    Args:
        old: the state to give.
        net: the net whose parameters the optimizer has.
        optimizer: what receives the state. A tensor that does not fit starts anew.
        wanted: what the optimizer keeps, from ``initial_state``.

    Returns:
        Per quantity, the number of tensors that were given, and of those that start at their initial value.
    """
    kept: Counter[str] = Counter()
    reset: Counter[str] = Counter()
    for name, param in net.named_parameters():
        needs, there = wanted.get(name, {}), old.get(name, {})
        fits = bool(needs) and all(key in there and there[key].shape == value.shape for key, value in needs.items())
        if fits:
            optimizer.state[param].update({key: there[key].to(needs[key].device) for key in needs})
        (kept if fits else reset).update(needs.keys())
    return dict(kept), dict(reset)


def made_optimizer(configure: Callable[[], Any]) -> Optimizer:
    """A new optimizer, without its schedule, from what Lightning calls ``configure_optimizers``."""
    made = configure()
    return made["optimizer"] if isinstance(made, Mapping) else made
