"""Makes a saved state_dict fit an optimizer, or refuses it before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.local_params import is_dtensor, local_tensor, named_params
from optim.registry import get_info

SKIPPED = "skipped_steps"
ROW = "clip_stats"
"""The key of a parameter's row of statistics."""

# Options of torch.optim that choose how a step is computed, not what it computes.
_HOW = {"foreach", "fused", "capturable", "differentiable"}
_OTHER_STEP = ("lr_decay", "momentum", "dampening", "nesterov", "amsgrad")


def fit(param_groups: list[dict[str, Any]], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state_dict that torch.optim.Optimizer.load_state_dict can take over as it is.

    A group takes its settings from the checkpoint, and those that the checkpoint lacks from the group at hand. State is
    moved to the parameter's device and cast to the dtype in which the update keeps it: that of the parameter, float32
    where that is narrower. The checkpoint of a torch.optim optimizer whose state has the same names is taken over
    (Adagrad's `sum` is G, Adam's moments are m and v).

    Args:
        param_groups: Those of the optimizer.
        saved: The state_dict.

    Returns:
        The keys of its `state` are parameters, which torch leaves as they are. It casts what has a number as key.

    Raises:
        ValueError: a group was saved by another method, or with an option that its method does not have; a state is of
            another shape, is missing or is unknown; a saved setting is out of range.
        TypeError: a saved setting has the wrong type.
    """
    groups = saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in param_groups]:
        return dict(saved)  # torch says what does not fit
    fitted = [_fit_group(number, *pair) for number, pair in enumerate(zip(param_groups, groups, strict=True))]
    keys = [key for group in groups for key in group["params"]]
    foreign = [("method" not in group) for group in groups for _ in group["params"]]
    found = zip(keys, foreign, named_params(param_groups), strict=True)
    settings = {id(here): there for here, there in zip(param_groups, fitted, strict=True)}
    owners = {key: (param, name, settings[id(group)], other) for key, other, (group, name, param) in found}
    state: dict[Any, Any] = {}
    for key, values in saved["state"].items():
        if key not in owners:
            state[key] = values
        elif values:
            state[owners[key][0]] = _fit_state(values, *owners[key])
    return {**saved, "state": state, "param_groups": fitted}


def _fit_group(number: int, here: dict[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved group, completed by the group at hand."""
    method = get_info(here["method"])
    where = f"group {number} of the checkpoint"
    if there.get("method", method.name) != method.name:
        raise ValueError(
            f"{where}: saved by method {there['method']!r}, the optimizer has {method.name!r}. To go on from its "
            "accumulators, load {**optimizer.state_dict(), 'state': checkpoint['state']}"
        )
    known = method.all_hyperparameters
    extra = {name: value for name, value in there.items() if name not in known}
    if "method" not in there:
        for name in _OTHER_STEP:
            if extra.pop(name, None):
                raise ValueError(f"{where}: saved with {name}={there[name]!r}, which {method.name} does not have")
        extra = {name: value for name, value in extra.items() if name not in _HOW}
    given = {name: there.get(name, here.get(name)) for name in known}
    settings = method.resolve(given, f"{where} ({method.name})")
    if isinstance(here["lr"], Tensor) and isinstance(settings["lr"], Tensor):
        settings["lr"] = settings["lr"].to(here["lr"].device)
    if SKIPPED in extra and here["params"]:
        extra[SKIPPED] = torch.as_tensor(extra[SKIPPED]).to(local_tensor(here["params"][0]).device)
    kept = {name: value for name, value in here.items() if name not in known and name not in ("params", SKIPPED)}
    return {**kept, **extra, **settings}


def _fit_state(
    values: Mapping[str, Any], param: Tensor, name: str, settings: Mapping[str, Any], foreign: bool
) -> dict[str, Any]:
    """Return a parameter's state on its device, in the dtype and the shapes of a fresh one."""
    method = get_info(settings["method"])
    update = method.update if method.update_for is None else method.update_for(settings)
    fresh = update.init(torch.empty(param.shape, dtype=param.dtype, device="meta"), settings)
    device = local_tensor(param).device
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key in fresh:
            result[key] = _fit_value(f"{name}: state {key!r}", value, fresh[key], param)
        elif key == ROW:
            result[key] = value.to(device)
        elif foreign and key != "step" and value is not None:
            raise ValueError(f"{name}: the checkpoint has a state {key!r}, which {method.name} does not keep")
        elif not foreign and key != "step":
            result[key] = value.to(device) if isinstance(value, Tensor) else value
    missing = [key for key in fresh if key not in result]
    if missing and (foreign or any(key in result for key in fresh)):
        raise ValueError(f"{name}: the checkpoint has no state {missing[0]!r}, which {method.name} keeps")
    return result


def _fit_value(where: str, value: Any, fresh: Tensor, param: Tensor) -> Tensor:
    device = local_tensor(param).device
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=fresh.dtype, device=device)
    if fresh.ndim == 0 and value.numel() == 1:
        value = value.reshape(())
    if value.shape != fresh.shape:
        raise ValueError(f"{where} has shape {tuple(value.shape)} in the checkpoint and {tuple(fresh.shape)} here")
    if fresh.ndim and is_dtensor(value) != is_dtensor(param):
        raise ValueError(
            f"{where}: only one of the saved tensor and the parameter is sharded; load it by "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    adopted: Tensor = value.to(device=device, dtype=fresh.dtype)
    return adopted
