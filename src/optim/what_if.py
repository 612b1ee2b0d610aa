"""The sigma that other methods would have chosen on the same gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from optim.batch import Batch, choose_sigma, make_batches
from optim.optimizer import SigmaOptimizer
from optim.registry import get_info
from optim.updates.adagrad import ARRANGEMENT

Rules = Sequence[str] | Mapping[str, Mapping[str, Any]]


@torch.no_grad()
def what_if(optimizer: SigmaOptimizer, rules: Rules) -> dict[str, dict[str, float]]:
    """Return the sigma each rule would choose now, by label and parameter name; changes nothing.

    Call it after backward() and before step(): the accumulators are then those the step will use. The rule is applied
    to the optimizer's own r, as in Figure 4 of the paper, whatever update the named method is registered with.

    Args:
        optimizer: Its gradients, state and learning rates are looked at.
        rules: Names of methods, with their default hyperparameters; or label to hyperparameters, where `method` names
            the method if the label does not: `{"gc": {}, "mild": {"method": "agc", "clip_factor": 1e-1}}`.

    Raises:
        TypeError, ValueError: as `build_optimizer`, for an unknown rule or hyperparameter.
    """
    named = rules if isinstance(rules, Mapping) else {name: {} for name in rules}
    works = optimizer.gather(keep_state=False)
    report: dict[str, dict[str, float]] = {}
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
        sigmas: dict[str, float] = {}
        for batch in make_batches(hypothetical, optimizer.backends):
            choose_sigma(batch)
            sigmas |= _by_name(batch)
        report[label] = {work.name: sigmas[work.name] for work in works}
    return report


def _by_name(batch: Batch) -> dict[str, float]:
    names = [work.name for work in batch.works]
    if batch.sigma is None:
        return dict.fromkeys(names, 1.0)
    if batch.by_unit:
        return {names[0]: float(batch.sigma.amin()) if batch.sigma.numel() else 1.0}
    return dict(zip(names, batch.sigma.tolist(), strict=True))
