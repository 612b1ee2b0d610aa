"""What is believed of a saved configuration: it names known classes only, and nothing in it is interpolated.

Hydra's ``instantiate`` imports and calls whatever ``_target_`` names, and OmegaConf's interpolations read environment
variables and files. Both are right for the user's own configuration. A ``config.yaml`` in a run folder or a capsule may
come from somebody else, so everything that reads one goes through :func:`read_config`. SECURITY.md states the policy.
Programs of an export are checked by ``ranker.export.checked_archive``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ranker.errors import UserError

# Exact names. A prefix is never enough: Hydra looks up each part of a dotted name, so that "ranker.build.os.system"
# is os.system. Every entry must be safe with any arguments: it imports, unpickles and executes nothing that they name.
TARGETS = frozenset(
    (
        "optim.build_optimizer",
        "optim.what_if",
        "ranker.models.SharedBottom",
        "ranker.models.MMoE",
        "ranker.models.PLE",
        "ranker.data.parquet_log.ParquetLog",
        "ranker.data.sources.prepared",
        "ranker.data.sources.prepared_from",
        "ranker.data.synthetic.SyntheticLog",
        "ranker.data.synthetic_world.Difficulty",
        "ranker.losses.BPR",
        "ranker.losses.JRC",
        "ranker.losses.SoftmaxLoss",
        "ranker.metrics.CalibrationBuckets",
        "ranker.metrics.GroupAUC",
        "ranker.metrics.MAE",
        "ranker.metrics.MRR",
        "ranker.metrics.NDCG",
        "ranker.metrics.Recall",
        "ranker.metrics.SegmentedNE",
        "ranker.metrics.XAUC",
        "ranker.training.capsule_writer.CapsuleWriter",
        "ranker.training.ddp.WatchedDDP",
        "ranker.training.fsdp.WatchedFSDP",
        "ranker.training.early_signs_callback.EarlySigns",
        "ranker.training.early_stop.EarlyStop",
        "ranker.training.progress.TrainingProgress",
        "ranker.training.rollback.Rollback",
        "ranker.training.sharpness_probe.SharpnessProbe",
        "ranker.training.snapshots.SnapshotRing",
        "ranker.training.stability_callback.DivergenceWatch",
        "ranker.training.histograms.Histograms",
        "ranker.training.trackers.metrics_csv",
        "ranker.training.trackers.mlflow",
        "ranker.training.trackers.tensorboard",
        "ranker.training.trackers.weights_and_biases",
        "pytorch_lightning.Trainer",
        "pytorch_lightning.callbacks.DeviceStatsMonitor",
        "pytorch_lightning.callbacks.EarlyStopping",
        "pytorch_lightning.callbacks.LearningRateMonitor",
        "pytorch_lightning.callbacks.Timer",
        "pytorch_lightning.strategies.DDPStrategy",
        "pytorch_lightning.strategies.FSDPStrategy",
        "pytorch_lightning.strategies.SingleDeviceStrategy",
    )
)
TARGET, INTERPOLATION = "_target_", "${"


def read_config(path: Path) -> DictConfig:
    """Reads a saved configuration. Builds nothing; :func:`check_targets` must pass before anything is built from it.

    A configuration is saved resolved. An interpolation in it was put there by somebody, and resolving it would write,
    for example, the value of an environment variable into the next ``config.yaml``.

    Args:
        path: the file.

    Raises:
        UserError: it cannot be read, is not a mapping, or holds ``${``.
    """
    try:
        found = OmegaConf.load(path)  # a safe loader: tags make no objects
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a configuration: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, DictConfig):
        raise UserError(f"{path} is not a configuration: it holds no mapping")
    check_resolved(found, str(path))
    return found


def check_resolved(cfg: DictConfig, source: str) -> None:
    """Refuses a configuration from elsewhere that holds an interpolation, in a value or in a key.

    Raises:
        UserError: it does.
    """
    for place, value in _scalars(OmegaConf.to_container(cfg, resolve=False)):
        if isinstance(value, str) and INTERPOLATION in value:
            raise UserError(
                f"{source}: {place} holds '{INTERPOLATION}', but a saved configuration is resolved and nothing in it "
                "is interpolated; write the value itself there"
            )


def check_targets(cfg: DictConfig, path: Path, *, trusted: Collection[str] = (), own: DictConfig | None = None) -> None:
    """Refuses a saved configuration that names a ``_target_`` outside the allow list, at any depth.

    Args:
        cfg: from :func:`read_config`.
        path: its file, for the message.
        trusted: more names that the user allows, each in full: the option ``trust``.
        own: the user's own configuration, as composed for this command. What it names at the same place is allowed.

    Raises:
        UserError: a name is not allowed. Nothing was imported.
    """
    known = dict(targets(own)) if own is not None else {}
    for place, name in targets(cfg):
        if isinstance(name, str) and (name in TARGETS or name in trusted or known.get(place) == name):
            continue
        where = place.removesuffix(f".{TARGET}")
        raise UserError(
            f"{path}: {where} names {name!r}, which is not on the list of what a saved configuration may run; if it is "
            f"yours, allow it: trust=[{name}] for train.py, --trust {name} for other commands (see SECURITY.md)"
        )


def load_config(path: Path, *, trusted: Collection[str] = ()) -> DictConfig:
    """A saved configuration from which something will be built: read and checked.

    Raises:
        UserError: as :func:`read_config` and :func:`check_targets`.
    """
    cfg = read_config(path)
    check_targets(cfg, path, trusted=trusted)
    return cfg


def targets(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    """Each ``_target_`` of a configuration with its place, a dotted key. Lists are searched too."""
    for place, value in _scalars(OmegaConf.to_container(cfg, resolve=False), stop_at=TARGET):
        if place.split(".")[-1] == TARGET:
            yield place, value


def _scalars(node: Any, place: str = "", stop_at: str | None = None) -> Iterator[tuple[str, Any]]:
    """The keys and values below a node that are neither mappings nor lists, each with its place."""
    if place and place.split(".")[-1] == stop_at:
        yield place, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            where = f"{place}.{key}" if place else str(key)
            if stop_at is None:
                yield where, key
            yield from _scalars(value, where, stop_at)
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            yield from _scalars(value, f"{place}[{number}]", stop_at)
    else:
        yield place, node
