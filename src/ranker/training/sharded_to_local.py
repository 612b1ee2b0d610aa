"""What a capsule of a run with sharded tables needs to be trained again in one process: configuration and state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from ranker.capsules.training_state import TrainingState
from ranker.data.schema import Schema
from ranker.models.embeddings import EmbeddingTables
from ranker.training.module import OptimizerFactory

_WEIGHT = "embeddings.tables.dim_{}.weight"
_HANDLE = ""  # stands for the parameter of the tables' group


def local_config(cfg: DictConfig) -> DictConfig:
    """The configuration with local tables, whose optimizer is that of the sharded ones."""
    found = cfg.copy()
    OmegaConf.set_struct(found, False)
    found.embeddings = {"name": "local"}
    if OmegaConf.select(found, "model.net.sparse_embeddings") is not None:
        found.model.net.sparse_embeddings = True  # a step costs what its rows cost
    return found


def local_state(
    state: TrainingState,
    found: Mapping[int, Mapping[str, Tensor]],
    schema: Schema,
    *,
    net: nn.Module,
    optimizer: Optimizer,
    factory: OptimizerFactory,
    lr: float,
) -> TrainingState:
    """The state of a run with sharded tables as one with local tables has it.

    The optimizer has one group for a parameter without elements, where that of local tables has one for the tables, at
    another place. So the groups come in the order of a new optimizer over a net with local tables.

    Args:
        state: without the tables.
        found: weights and ``sum`` of the tables by width.
        schema: its tables have these rows.
        net: the run's.
        optimizer: the run's.
        factory: makes an optimizer such as the run's, as ``RankingModule``'s.
        lr: learning rate of the run.
    """
    local = copy.copy(net)
    with torch.device("meta"):  # no memory, and no random number
        local._modules = {**net._modules, "embeddings": EmbeddingTables(schema)}
    made = factory(model_or_params=local, lr=lr)
    names = {id(param): name for name, param in local.named_parameters()}
    known = {id(param): name for name, param in net.named_parameters()}
    order = [
        (known.get(id(param), _HANDLE), number)
        for number, group in enumerate(optimizer.param_groups)
        for param in group["params"]
    ]
    group_of, index_of = dict(order), {name: index for index, (name, _) in enumerate(order)}
    sums = {_WEIGHT.format(dim): {k: x for k, x in tensors.items() if k != "weight"} for dim, tensors in found.items()}
    saved, states = state.optimizer, {}
    groups: list[dict[str, Any]] = []
    places: list[int] = []  # in the run, of each group
    for group in made.param_groups:
        own = [names[id(param)] for param in group["params"]]
        places.append(group_of[_HANDLE if own[0] in sums else own[0]])
        start = sum(len(other["params"]) for other in groups)
        settings = {**saved["param_groups"][places[-1]], "params": list(range(start, start + len(own)))}
        groups.append(settings | ({"param_names": own} if "param_names" in settings else {}))
        for index, name in enumerate(own, start):
            kept = sums[name] if name in sums else saved["state"].get(index_of[name])
            if kept:
                states[index] = kept
    return replace(
        state,
        net=state.net | {_WEIGHT.format(dim): tensors["weight"] for dim, tensors in found.items()},
        optimizer={**saved, "state": states, "param_groups": groups},
        schedule=_in_order(state.schedule, places),
        mark=None,
    )


def _in_order(schedule: dict[str, Any] | None, places: list[int]) -> dict[str, Any] | None:
    """The state of a schedule, whose lists have an entry for each group, for groups in another order."""
    if schedule is None:
        return None
    return {
        name: [value[place] for place in places] if isinstance(value, list) and len(value) > max(places) else value
        for name, value in schedule.items()
    }
