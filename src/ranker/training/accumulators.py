"""The accumulators of an earlier run in a new one: kept, decayed or floored, and put into the new optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ranker.config import WarmStartSettings
from ranker.training.module import RankingModule
from ranker.training.optimizer_transfer import StateByName, initial_state, made_optimizer
from ranker.training.weight_transfer import Move

SQUARES = ("sum", "exp_avg_sq")  # Adagrad's G and Adam's v, in units of a squared gradient
_REPORTS = ("clip_stats",)  # state that only reports
_TABLES = "embeddings."


def by_name(saved: Mapping[str, Any]) -> StateByName:
    """The state of a saved optimizer by parameter name; of groups without names, nothing."""
    found: dict[str, dict[str, Tensor]] = {}
    for group in saved["param_groups"]:
        for name, key in zip(group.get("param_names", ()), group["params"], strict=False):
            state = saved["state"].get(key, {})
            found[name] = {k: v for k, v in state.items() if isinstance(v, Tensor) and k not in _REPORTS}
    return found


def changed(old: StateByName, groups: list[dict[str, Any]], settings: WarmStartSettings, *, rows: int) -> StateByName:
    """The accumulators with which the new run begins.

        keep     G
        decay    G_0 + (G - G_0) 2^(-rows / half_life_rows)      v: G_0 = 0
        floor    max(G, floor * median of G over the tensor)     layers only

    Tables are not floored: an id that was never seen has to learn with the large steps of a small accumulator.

    Args:
        old: the parent's state.
        groups: settings of the parent's groups.
        settings: which of these.
        rows: rows that the parent was trained on.
    """
    if settings.accumulators not in ("decay", "floor"):
        return old
    start = {name: group.get("initial_accumulator_value", 0.0) for group in groups for name in group["param_names"]}
    found: dict[str, dict[str, Tensor]] = {}
    for name, state in old.items():
        found[name] = dict(state)
        for key in (key for key in SQUARES if key in state):
            total = state[key]
            if settings.accumulators == "decay":
                least = float(start[name]) if key == "sum" else 0.0
                found[name][key] = decayed(total, settings, start=least, rows=rows)
            elif not name.startswith(_TABLES) and total.numel():
                found[name][key] = total.clamp_min(float(settings.floor * total.median()))
    return found


def decayed(total: Tensor, settings: WarmStartSettings, *, start: float, rows: int) -> Tensor:
    """``warm_start.accumulators=decay`` of an accumulator that began at ``start``, after some rows."""
    assert settings.half_life_rows is not None
    return start + (total - start) * 2.0 ** (-rows / settings.half_life_rows)


@torch.no_grad()
def put(
    old: StateByName,
    moves: Mapping[str, Move],
    groups: list[dict[str, Any]],
    module: RankingModule,
    optimizer: Optimizer,
) -> list[str]:
    """Puts accumulators into the optimizer of a new run, along with the weights that they belong to.

    Args:
        old: the parent's state, by its names.
        moves: where each new weight comes from.
        groups: settings of the parent's groups.
        module: the new module.
        optimizer: its optimizer, without state yet.

    Returns:
        What starts anew, in at most one line.
    """
    net = module.net
    then, now = _methods(groups), _methods(optimizer.param_groups)
    simple = all(not m.axes and then.get(m.source) == now.get(name) for name, m in moves.items() if name in now)
    # The initial state costs a copy of all weights, so it is made only where a tensor needs it.
    wanted = None if simple else initial_state(net, made_optimizer(module.configure_optimizers))
    anew = 0
    for name, parameter in net.named_parameters():
        move = moves.get(name)
        state = {} if move is None else old.get(move.source, {})
        if not state or (wanted is not None and not wanted.get(name, {}).keys() <= state.keys()):
            anew += 1
            continue
        assert move is not None
        for key in state if wanted is None else wanted[name]:
            value = state[key]
            if value.ndim and move.axes:
                assert wanted is not None
                fresh = wanted[name][key].clone()
                move.copy(fresh, value)
                optimizer.state[parameter][key] = fresh
            else:
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
    return [f"accumulators start anew for {anew} of {len(list(net.parameters()))} tensors"] if anew else []


def _methods(groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: group.get("method") for group in groups for name in group.get("param_names", ())}
