"""A run's name from what decides its numbers, so that the same run is recognised whatever its job number."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

LENGTH = 12  # hex digits: 48 bits, a chance of one in a billion that two of 700 runs meet

# What does not decide the numbers of a run, and why.
LEFT_OUT = (
    "hydra",  # the launcher, the sweeper and where the folders lie
    "resume",  # a resumed run gives the numbers of one that never stopped
    "force",
    "objective",  # read from the summary when asked for
    "tags",
    "logger",
    "callbacks.progress",  # what is shown
    "train.checkpoint_every",
    # The machine's share in a run, not the experiment's: threads move sums by rounding, as another machine does
    # (summary.json names it), and a sweep that goes on elsewhere or with more jobs at a time is still the same sweep.
    "train.threads",
    "data.num_workers",  # threads that read ahead
    "data.cache_dir",
    "data.log.cache_dir",
    "lr",  # data.base_lr of the scale times lr_mult
    "model.widths",  # for all scales; those of the chosen scale are resolved into model.net
    "scale.model",  # where older runs have the widths of all models
)


def config_hash(cfg: DictConfig) -> str:
    """The first digits of SHA-256 over the resolved configuration, without what is in ``LEFT_OUT``.

    Keys are sorted, and 2 and 2.0 are the same number. A configuration that cannot be resolved is hashed as written:
    its job will fail with the reason, and a failed job is not looked up.

    Args:
        cfg: the configuration of a job, with or without Hydra's own node.
    """
    try:
        plain = _plain(cfg, resolve=True)
    except OmegaConfBaseException:
        plain = _plain(cfg, resolve=False)
    for path in LEFT_OUT:
        _drop(plain, path.split("."))
    data = plain.get("data")
    if isinstance(data, dict) and "root" in data:  # the former name of data.source: a run has one hash by either
        data["root"] = data.pop("source", data["root"])
    text = json.dumps(_same_numbers(plain), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def register() -> None:
    """Gives ``${config_hash:}`` to configurations, for the names of run folders."""
    OmegaConf.register_new_resolver("config_hash", lambda *, _root_: config_hash(_root_), replace=True)


def _plain(cfg: DictConfig, *, resolve: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in cfg:
        if key in LEFT_OUT:  # hydra refers to this very hash: resolving it would never end
            continue
        node = cfg._get_node(key)
        missing = OmegaConf.is_missing(cfg, key)
        if OmegaConf.is_config(node):
            found[str(key)] = OmegaConf.to_container(node, resolve=resolve)
        else:
            found[str(key)] = "???" if missing else (cfg[key] if resolve else str(node))
    return found


def _drop(tree: dict[str, Any], path: list[str]) -> None:
    for name in path[:-1]:
        tree = tree.get(name) or {}
        if not isinstance(tree, dict):
            return
    tree.pop(path[-1], None)


def _same_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _same_numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_same_numbers(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
