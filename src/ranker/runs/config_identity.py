"""What identifies a run: a hash of the settings that decide its numbers, and the list of settings that do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

LENGTH = 12  # hex digits: 48 bits, a chance of one in a billion that two of 700 runs collide

# Settings, and whole branches of settings, that do not decide the numbers of a run.
NOT_IDENTIFYING = (
    "sweep",  # whether jobs are trained as one
    "hydra",  # the launcher, the sweeper and the output folders
    "resume",  # a resumed run gives the numbers of an uninterrupted one
    "force",
    "trust",  # what a resumed run may load
    "warm_start.parent",  # follows from warm_start.path
    "objective",  # read from the summary on request
    "tags",
    "logger",
    # Callbacks that only observe training, and how often they and the metrics are written.
    "callbacks.progress",
    "callbacks.early_signs",
    "callbacks.sharpness",
    "callbacks.capsules",
    "callbacks.histograms",
    "callbacks.snapshots.disk",
    "callbacks.snapshots.rows_above",
    "metrics",  # what is computed from the predictions on the hold-out
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_rows_above",
    "train.checkpoint_full_share",
    # The machine's share in a run, not the experiment's. The number of threads changes sums by rounding, as another
    # machine does (summary.json names it); a sweep continued elsewhere or with more parallel jobs is the same sweep.
    "train.threads",
    "data.num_workers",  # threads that read ahead
    "data.cache_dir",
    "data.log.cache_dir",
    # Where rows are: sums differ by rounding.
    "embeddings.plan",
    "embeddings.tables",
    "embeddings.memory_gib",
)
# Options that older versions did not have, with the value that does what those versions did: left out of the hash, so
# that a run has one hash before and after the option came.
ADDED = {
    "train.epochs": 1,
    "train.average_decay": 0,
    "data.log.row_weights": 0,
    "data.log.first_day": 0,
    "data.keep_groups": None,
    "warm_start.at_windows": False,
    "data.strips": 1,
    "loss": {"name": "pointwise"},
    "embeddings": {"name": "local"},
}
# What a resolved configuration repeats elsewhere: the learning rate in data.base_lr and lr_mult, widths in model.net.
_RESOLVED_INTO_OTHERS = ("lr", "model.widths", "scale.model")  # scale.model: where runs of older versions have widths


def config_hash(cfg: DictConfig) -> str:
    """The first digits of SHA-256 over the resolved configuration, without what is in ``NOT_IDENTIFYING``.

    Keys are sorted, and 2 and 2.0 are the same number. A configuration that cannot be resolved is hashed as written:
    its job fails with the reason, and failed jobs are not looked up.

    Args:
        cfg: the configuration of a job, with or without Hydra's own node.
    """
    return _digest(_identifying(cfg))


def cell_hash(cfg: DictConfig) -> str:
    """The hash of a configuration without its seed: equal for the runs that are averaged."""
    plain = _identifying(cfg)
    plain.pop("seed", None)
    return _digest(plain)


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings behind ``cell_hash``, by dotted key. Lists are values."""
    plain = _identifying(cfg)
    plain.pop("seed", None)
    return dict(_leaves(plain))


def is_below(key: str, branches: Iterable[str]) -> bool:
    """Whether a dotted key is one of some keys, or lies below one of them."""
    return any(key == branch or key.startswith(f"{branch}.") for branch in branches)


def register() -> None:
    """Registers the resolver ``${config_hash:}``, which names run folders."""
    OmegaConf.register_new_resolver("config_hash", lambda *, _root_: config_hash(_root_), replace=True)


def _identifying(cfg: DictConfig) -> dict[str, Any]:
    try:
        plain = _plain(cfg, resolve=True)
    except OmegaConfBaseException:
        plain = _plain(cfg, resolve=False)
    for path in (*NOT_IDENTIFYING, *_RESOLVED_INTO_OTHERS):
        _drop(plain, path.split("."))
    for path, value in ADDED.items():
        if _at(plain, path.split(".")) == value:
            _drop(plain, path.split("."))
    callbacks = plain.get("callbacks")
    if isinstance(callbacks, dict) and not (callbacks.get("early_stop") or {}).get("patience", 0):
        callbacks.pop("early_stop", None)  # switched off: as in runs from before there was the option
    start = plain.get("warm_start")
    if isinstance(start, dict) and start.get("path") is None and "at_windows" not in start:
        del plain["warm_start"]  # as in runs from before there was the option
    data = plain.get("data")
    if isinstance(data, dict) and "root" in data:  # the former name of data.source: a run has one hash by either
        data["root"] = data.pop("source", data["root"])
    return plain


def _digest(plain: dict[str, Any]) -> str:
    text = json.dumps(_same_numbers(plain), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _plain(cfg: DictConfig, *, resolve: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in cfg:
        if key in NOT_IDENTIFYING:  # hydra refers to this very hash: resolving it would recurse without end
            continue
        node = cfg._get_node(key)
        missing = OmegaConf.is_missing(cfg, key)
        if OmegaConf.is_config(node):
            found[str(key)] = OmegaConf.to_container(node, resolve=resolve)
        else:
            found[str(key)] = "???" if missing else (cfg[key] if resolve else str(node))
    return found


def _at(tree: Any, path: list[str]) -> Any:
    for name in path:
        tree = tree.get(name, ...) if isinstance(tree, dict) else ...
    return tree


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
