"""Takes over an optimizer's state, by parameter name: into another optimizer, or from a snapshot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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

    Args:
        net: its weights are as before afterwards; it has no gradients.
        made: a new optimizer over them, which is of no further use.
    """
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    made.step()
    found = {name: values for name, values in state_by_name(net, made).items() if values}
    for param in net.parameters():
        param.grad = None
    net.load_state_dict(before)
    return found


@torch.no_grad()
def take_over(
    old: StateByName, net: nn.Module, optimizer: Optimizer, wanted: StateByName
) -> tuple[dict[str, int], dict[str, int]]:
    """Copies state into an optimizer, for each parameter whose quantities are the same in the same shapes.

    Args:
        old: the state to copy.
        net: the net whose parameters the optimizer has.
        optimizer: what receives the state. A tensor that does not fit starts anew.
        wanted: what the optimizer keeps, from ``initial_state``.

    Returns:
        Per quantity, the number of tensors that were copied, and of those that start at their initial value.
    """
    kept: Counter[str] = Counter()
    reset: Counter[str] = Counter()
    for name, param in net.named_parameters():
        needs, there = wanted.get(name, {}), old.get(name, {})
        fits = bool(needs) and all(key in there and there[key].shape == value.shape for key, value in needs.items())
        if fits:
            optimizer.state[param].update({key: there[key].to(needs[key].device, copy=True) for key in needs})
        (kept if fits else reset).update(needs.keys())
    return dict(kept), dict(reset)


def made_optimizer(configure: Callable[[], Any]) -> Optimizer:
    """A new optimizer, without its schedule, from what Lightning calls ``configure_optimizers``."""
    made = configure()
    return made["optimizer"] if isinstance(made, Mapping) else made
