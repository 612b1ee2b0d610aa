"""A saved configuration with overrides: what a replay tries in place of what the run did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from ranker.config import check, learning_rate, register
from ranker.errors import UserError, suggest
from ranker.hydra_private import parse

# What can change in a replay; the batches, their order and the seed are the capsule's.
REPLAYABLE = (
    "model",
    "optim",
    "mitigation",
    "lr_mult",
    "train.warmup_steps",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.precision",
    "callbacks.rollback",
)


def altered(saved: DictConfig, overrides: list[str], *, folder: Path) -> DictConfig:
    """A saved configuration with overrides as train.py takes them: options of groups, then values.

    The overrides are composed with the groups that the saved configuration was made of, so that an unknown name is
    refused as train.py would, and what they change is put into the saved configuration. An option refers to other
    values (``${scale.name}``) as they were saved.

    Args:
        saved: a resolved configuration.
        overrides: such as ``["optim=clippy", "lr_mult=0.5"]``.
        folder: the folder of the configuration files.

    Raises:
        UserError: an override of something that a replay cannot change.
        HydraException: an override that train.py would refuse.
    """
    parsed = parse(overrides)
    for override in parsed:
        key, line = _key(override), override.input_line
        if not any(key == name or key.startswith(f"{name}.") for name in REPLAYABLE):
            raise UserError(f"'{line}' cannot change in a replay; {suggest(key, REPLAYABLE)}")
        if override.is_sweep_override() or override.is_delete():
            raise UserError(f"'{line}': a replay takes one value an override; give each alternative its own --try")
    groups = [_key(o) for o in parsed if (folder / _key(o)).is_dir()]
    names = {
        group: OmegaConf.select(saved, f"{group}.name") for group in ("scale", "data", "model", "optim", "mitigation")
    }
    # An option from outside the clone (--config-dir) has no file here; the saved configuration has its values.
    chosen = [
        f"{group}={name}"
        for group, name in names.items()
        if group not in groups and (folder / group / f"{name}.yaml").is_file()
    ]
    composed = _composed(folder, [*chosen, *overrides])
    merged = saved.copy()
    OmegaConf.set_struct(merged, False)
    for group in groups:
        merged[group] = composed[group]
    if "mitigation" in groups:
        before = _composed(folder, [*chosen, f"mitigation={names['mitigation'] or 'none'}"])
        _spread(merged, before, _composed(folder, [*chosen, f"mitigation={composed.mitigation.name}"]))
    for key in map(_key, parsed):
        if key.split(".")[0] not in groups:
            OmegaConf.update(merged, key, OmegaConf.select(composed, key), force_add=True)
    merged.lr = learning_rate(merged)
    check(merged)
    return merged


def _key(override: Any) -> str:
    """Where an override acts: of ``optim@callbacks.rollback.optim=clippy``, what stands behind the @."""
    return str(override.package or override.key_or_group)


def _composed(folder: Path, overrides: list[str]) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        return compose("config", overrides=overrides)


def _spread(merged: DictConfig, before: DictConfig, after: DictConfig) -> None:
    """Puts in what an option sets all over the configuration, as those of ``mitigation`` do."""
    old, new = (dict(_leaves(OmegaConf.to_container(cfg))) for cfg in (before, after))
    for key in sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        if not key.startswith(REPLAYABLE):
            raise UserError(f"mitigation '{after.mitigation.name}' changes {key}, which a replay cannot")
        if key in new:
            OmegaConf.update(merged, key, new[key], force_add=True)
        else:
            _remove(merged, key, after)


def _remove(merged: DictConfig, key: str, after: DictConfig) -> None:
    """Removes the largest part around a key that an option does not have, such as another optimizer for a rollback."""
    parts = key.split(".")
    for depth in range(1, len(parts) + 1):
        path, name = ".".join(parts[: depth - 1]), parts[depth - 1]
        if name not in (OmegaConf.select(after, path) if path else after):
            holder = OmegaConf.select(merged, path) if path else merged
            if holder is not None and name in holder:
                del holder[name]
            return


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
