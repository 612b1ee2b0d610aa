"""The detector's state of an earlier run, as the state with which the run that continues it begins."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_LEDGER = {"full_divergence": None, "micro_count": 0, "unsettled_count": 0, "first_step": None}


def carried(
    state: Mapping[str, Any], fresh: Mapping[str, Any], *, steps: int, tasks: Sequence[str], step_cut: bool
) -> dict[str, Any]:
    """Baselines, skill and AUCs go on where they were. Steps are counted from the new run's start, events from 0.

    Step s of the earlier run is step s - ``steps`` here, so what is open stays open with the same age. A task that the
    earlier run did not have begins without a past. Then nothing stays open, because a spike is judged by all tasks.

    Args:
        state: ``DivergenceDetector.state_dict()`` of the earlier run.
        fresh: the same of a new detector of the new run's tasks.
        steps: optimizer steps of the earlier run.
        tasks: the tasks of the earlier run that are still the same; a task whose label changed is another one.
        step_cut: keep the samples of the accumulators, which go on too.
    """
    found, new = copy.deepcopy(dict(state["classifier"])), copy.deepcopy(dict(fresh["classifier"]))
    same = list(found["tasks"]) == list(new["tasks"]) == list(tasks)
    kept = {name: found["tasks"][name] for name in tasks if name in new["tasks"]}
    for task in kept.values():
        task["high_since"] = None if task["high_since"] is None else task["high_since"] - steps
        batches = task["skill"]  # a list in older versions
        batches = batches.tolist() if isinstance(batches, Tensor) else batches
        task["skill"] = [[step - steps, *rest] for step, *rest in batches]
    for name in ("step_count", "step", "auc", "was_varied", "constant", "nonfinite"):
        new[name] = found[name]
    new["step"] -= steps
    for streak in (new["auc"]["at_chance"], new["auc"]["clearly_above"], new["constant"], new["nonfinite"]):
        streak["since"] -= steps
    new["tasks"] |= kept
    if same:
        spikes, probation = found["spikes"], found["probation"]
        every = [*spikes.values(), *(probation["spikes"] if probation else [])]
        for spike in {id(x): x for x in every if x}.values():
            spike["step"], spike["calm_since"] = spike["step"] - steps, spike["calm_since"] - steps
        if probation:
            probation["since"], probation["deadline"] = probation["since"] - steps, probation["deadline"] - steps
        new |= {name: found[name] for name in ("spikes", "before", "probation", "cut")}
    return {
        "classifier": new | _LEDGER,
        "unreported": [],
        "step_cut": state["step_cut"] if same and step_cut else None,
    }


def is_lost(state: Mapping[str, Any]) -> bool:
    """Whether the detector has reached the verdict that the model is lost."""
    return state["classifier"]["full_divergence"] is not None
