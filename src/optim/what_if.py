"""The sigma that other methods would have chosen on the same gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from optim.batch import Batch, choose_sigma, make_batches
from optim.optimizer import SigmaOptimizer
from optim.registry import get_info
from optim.updates.adagrad import ARRANGEMENT

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
    """Return the sigma each rule would choose now, by label and parameter name; changes nothing.

    Call it after backward() and before step(): the accumulators are then those the step will use. The rule is applied
    to the optimizer's own r, as in Figure 4 of the paper, whatever update the named method is registered with.

    Args:
        optimizer: Its gradients, state and learning rates are looked at.
        rules: Names of methods, with their default hyperparameters; or label to hyperparameters, where `method` names
            the method if the label does not: `{"gc": {}, "mild": {"method": "agc", "clip_factor": 1e-1}}`.
        names: Only parameters of these names; None for all. Costs a reduction a rule and parameter.
        read: Numbers, for which the device is waited for; False gives 0-d tensors on it.

    Raises:
        TypeError, ValueError: as `build_optimizer`, for an unknown rule or hyperparameter.
    """
    named = rules if isinstance(rules, Mapping) else {name: {} for name in rules}
    works = optimizer.gather(keep_state=False, names=names)
    report: dict[str, dict[str, Tensor]] = {}
    for label, given in named.items():
        settings = dict(given)
        method = get_info(settings.pop("method", label))
        own = method.resolve({"lr": 0.0, **settings}, where=f"what_if[{label!r}]")
        # The rule's hyperparameters, over those that r depends on.
        own = {spec.name: own[spec.name] for spec in method.hyperparameters if spec.name not in ARRANGEMENT}
        groups = {id(work.settings): {**work.settings, **own} for work in works}
        hypothetical = [
            replace(
                work, method=replace(method, update=work.method.update, idle=None), settings=groups[id(work.settings)]
            )
            for work in works
        ]
        sigmas: dict[str, Tensor] = {}
        for batch in make_batches(hypothetical, optimizer.backends):
            choose_sigma(batch)
            sigmas |= _by_name(batch)
        report[label] = {work.name: sigmas[work.name] for work in works}
    return _read(report) if read else report


def _by_name(batch: Batch) -> dict[str, Tensor]:
    names = [work.name for work in batch.works]
    one = torch.ones((), device=batch.device)
    if batch.sigma is None:
        return dict.fromkeys(names, one)
    if batch.by_unit:
        return {names[0]: batch.sigma.amin() if batch.sigma.numel() else one}
    return dict(zip(names, batch.sigma.unbind(), strict=True))


def _read(report: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Return the numbers, by one transfer a device."""
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
