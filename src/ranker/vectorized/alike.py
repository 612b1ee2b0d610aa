"""Which jobs can be trained as one, told from their configurations alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from ranker.runs.config_identity import config_hash

# What the replicas of a group may differ in. What does not identify a run may differ too.
MAY_DIFFER = ("seed", "lr_mult", "lr", "optim", "train.warmup_steps", "train.head_bias", "mitigation.name")
SAME_OPTIM = ("_target_", "backend", "on_nonfinite")  # of optim: they belong to the optimizer as a whole

# Settings of the trainer that a group has; any other value, and any other setting, is the business of Lightning.
_TRAINER = {
    "_target_": ("pytorch_lightning.Trainer",),
    "accelerator": ("cpu", "auto"),
    "devices": (1,),
    "num_nodes": (1,),
    "strategy": ("auto",),
    "precision": ("32-true", 32, "32"),
    "gradient_clip_val": (None,),
    "accumulate_grad_batches": (1,),
    "deterministic": (False,),
    "detect_anomaly": (False,),
}
_FREE = ("gradient_clip_algorithm",)  # has no effect without a bound
_LOGGERS = ("ranker.training.trackers.metrics_csv",)
# Callbacks that a group has; it shows its own progress.
_KNOWN = ("progress", "snapshots", "divergence", "capsules", "early_signs")
# Callbacks that are off at 0.
_SWITCHES = {"rollback": "tries", "early_stop": "patience", "sharpness": "every", "histograms": "every"}


def reasons_alone(cfg: DictConfig) -> list[str]:
    """Why a job must run by itself, each as the setting that is in the way; empty if it may join a group.

    Args:
        cfg: the resolved configuration of the job.
    """
    return [*_of_training(cfg), *_of_trainer(cfg), *_of_callbacks(cfg)]


def key_of(cfg: DictConfig) -> str:
    """Equal for jobs that may be trained as one."""
    common = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(common, DictConfig)
    kept = {name: common.optim.get(name) for name in SAME_OPTIM}
    with open_dict(common):
        for path in MAY_DIFFER:
            parent, _, name = path.rpartition(".")
            node = OmegaConf.select(common, parent) if parent else common
            if node is not None and name in node:
                del node[name]
        common.optim = kept
    return config_hash(common)


def chunks(members: Sequence[int], size: int) -> list[list[int]]:
    """Cuts a list into the smallest number of parts of at most ``size``, all of nearly the same length."""
    parts = -(-len(members) // size)
    bounds = [len(members) * part // parts for part in range(parts + 1)] if parts else [0]
    return [list(members[a:b]) for a, b in pairwise(bounds)]


def _of_training(cfg: DictConfig) -> Iterator[str]:
    if cfg.resume is not None:
        yield "resume"
    if OmegaConf.select(cfg, "warm_start.path") is not None or OmegaConf.select(cfg, "warm_start.parent") is not None:
        yield "warm_start"
    if OmegaConf.select(cfg, "warm_start.at_windows"):
        yield "warm_start.at_windows"
    if OmegaConf.select(cfg, "loss.name", default="pointwise") != "pointwise":
        yield f"loss={cfg.loss.name}"
    if OmegaConf.select(cfg, "embeddings.name", default="local") != "local":
        yield f"embeddings={cfg.embeddings.name}"
    if cfg.train.get("average_decay"):
        yield f"train.average_decay={cfg.train.average_decay}"
    if cfg.train.compile:
        yield "train.compile=true"
    if cfg.optim.get("_target_") != "optim.build_optimizer":
        yield f"optim._target_={cfg.optim.get('_target_')}"
    if (policy := cfg.optim.get("on_nonfinite") or "propagate") != "propagate":
        yield f"optim.on_nonfinite={policy}"
    if cfg.optim.get("backend") == "compiled":
        yield "optim.backend=compiled"
    for name, node in cfg.logger.items():
        if node is not None and node.get("_target_") not in _LOGGERS:
            yield f"logger {name}"


def _of_trainer(cfg: DictConfig) -> Iterator[str]:
    for name, value in cfg.trainer.items():
        if name not in _FREE and not (name in _TRAINER and value in _TRAINER[str(name)]):
            yield f"trainer.{name}={value}"
    if cfg.trainer.get("accelerator") == "auto" and torch.cuda.is_available():
        yield "trainer.accelerator=auto (there is a GPU)"


def _of_callbacks(cfg: DictConfig) -> Iterator[str]:
    for name, node in cfg.callbacks.items():
        if node is None or name in _KNOWN:
            continue
        switch = _SWITCHES.get(str(name))
        if switch is None:
            yield f"callbacks.{name}"
        elif node.get(switch):
            yield f"callbacks.{name}.{switch}={node[switch]}"
