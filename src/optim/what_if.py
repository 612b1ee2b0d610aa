"""`what_if`: the sigma that other methods would have chosen for the same gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from optim.optimizer import SigmaOptimizer
from optim.registry import get_info
from optim.tensor_group import TensorGroup, choose_sigma, make_groups

Rules = Sequence[str] | Mapping[str, Mapping[str, Any]]


@overload
def what_if(
    optimizer: SigmaOptimizer, rules: Rules, *, names: Collection[str] | None = None, read: Literal[True] = True
) -> dict[str, dict[str, float]]: ...
@overload
def what_if(
    optimizer: SigmaOptimizer, rules: Rules, *, names: Collection[str] | None = None, read: Literal[False]
) -> dict[str, dict[str, Tensor]]: ...
@torch.no_grad()
def what_if(
    optimizer: SigmaOptimizer, rules: Rules, *, names: Collection[str] | None = None, read: bool = True
) -> dict[str, dict[str, float]] | dict[str, dict[str, Tensor]]:
    """Return the sigma each rule would choose now, by label and parameter name. Changes nothing.

    Call it after backward() and before step(), because the accumulators are then those that the step will use. The
    rule is applied to the optimizer's own r, as in Figure 4 of the paper, whatever update the named method has.

    Args:
        optimizer: Its gradients, state and learning rates are read.
        rules: Names of methods, with their default hyperparameters; or label to hyperparameters, where `method` names
            the method if the label does not: `{"gc": {}, "mild": {"method": "agc", "clip_factor": 1e-1}}`.
        names: Only parameters of these names; None for all. The cost is one reduction per rule and parameter.
        read: True returns numbers, and waits for the device. False returns 0-d tensors on the device.

    Raises:
        TypeError, ValueError: as `build_optimizer`, for an unknown rule or hyperparameter.
    """
    named = rules if isinstance(rules, Mapping) else {name: {} for name in rules}
    gathered = optimizer.gather(keep_state=False, names=names)
    report: dict[str, dict[str, Tensor]] = {}
    for label, given in named.items():
        hyperparameters = dict(given)
        method = get_info(hyperparameters.pop("method", label))
        own = method.resolve({"lr": 0.0, **hyperparameters}, where=f"what_if[{label!r}]")
        # Only the rule's hyperparameters. Those of the update are the optimizer's, and so is the update itself.
        own = {spec.name: own[spec.name] for spec in method.hyperparameters}
        rule = replace(method, never_clips=lambda _settings: False)
        settings = {id(local.settings): {**local.settings, **own} for local in gathered}
        hypothetical = [replace(local, method=rule, settings=settings[id(local.settings)]) for local in gathered]
        sigmas: dict[str, Tensor] = {}
        for group in make_groups(hypothetical, optimizer.backends):
            choose_sigma(group)
            sigmas |= _by_name(group)
        report[label] = {local.name: sigmas[local.name] for local in gathered}
    return _read(report) if read else report


def _by_name(group: TensorGroup) -> dict[str, Tensor]:
    names = [local.name for local in group.locals]
    one = torch.ones((), device=group.device)
    if group.sigma is None:
        return dict.fromkeys(names, one)
    if group.by_unit:
        return {names[0]: group.sigma.amin() if group.sigma.numel() else one}
    return dict(zip(names, group.sigma.unbind(), strict=True))


def _read(report: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Return the numbers, by one transfer per device."""
    by_device: dict[torch.device, list[tuple[str, str, Tensor]]] = defaultdict(list)
    for label, sigmas in report.items():
        for name, sigma in sigmas.items():
            by_device[sigma.device].append((label, name, sigma))
    read: dict[str, dict[str, float]] = {label: dict.fromkeys(sigmas, 1.0) for label, sigmas in report.items()}
    for triples in by_device.values():
        numbers = torch.stack([sigma.double() for *_, sigma in triples]).tolist()
        for (label, name, _), number in zip(triples, numbers, strict=True):
            read[label][name] = number
    return read
