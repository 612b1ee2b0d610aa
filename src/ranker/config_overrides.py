"""A saved configuration with overrides: what a resumed run changes, and what a replay tries."""

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
from ranker.runs.config_identity import is_below
from ranker.runs.run_folder import CONFIG, RunFolder

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

# What trainer=NAME changes in a resumed run: where it runs, and how its processes work together.
WHERE = ("accelerator", "devices", "num_nodes", "strategy")

# What can change when a run resumes. Anything else would make it another run: other batches, another model.
RESUMABLE = (
    "lr_mult",
    "data.base_lr",
    "optim",
    "train",
    "trainer",
    "callbacks",
    "logger",
    "metrics",
    "data.source",
    "data.root",
    "data.log.root",
    "data.cache_dir",
    "data.log.cache_dir",
    "data.on_bad_rows",
    "data.log.on_bad_rows",
    "data.num_workers",
    "data.eval_max_rows",
    "scale.eval_batch_size",
    "embeddings.plan",
    "embeddings.tables",
    "embeddings.memory_gib",
    "objective",
    "tags",
)
NOT_RESUMABLE = (
    "optim.name",
    "optim._target_",
    "optim.groups",
    "train.warmup_steps",
    "trainer._target_",
    "trainer.accumulate_grad_batches",
)
GROUPS = (
    "scale",
    "data",
    "model",
    "optim",
    "mitigation",
    "loss",
    "metrics",
    "embeddings",
)  # whose option a saved configuration names


def resumed_words(words: list[str], *, conf: Path) -> list[str]:
    """The command line of a resumed run, with the groups that the run was made of, and with its folder for the log.

    So an override of a resumed run is composed as it was for the run itself: ``data.source`` exists for
    ``data=parquet`` only. Any other command line is returned as it is.

    Args:
        words: the arguments.
        conf: the folder of the configuration files.
    """
    given = [word.removeprefix("resume=").strip("'\"") for word in words if word.startswith("resume=")]
    folder = Path(given[-1]) if given else None
    if folder is None or not (folder / CONFIG).is_file():
        return words
    saved = RunFolder(folder).read_config()
    places = [conf, *(Path(words[i + 1]) for i, word in enumerate(words[:-1]) if word in ("--config-dir", "-cd"))]
    chosen = []
    for group in GROUPS:
        name = str(OmegaConf.select(saved, f"{group}.name"))
        if "/" in name or "\\" in name:  # a path could lead Hydra to a file outside the user's configuration
            continue
        asked = any(word.startswith(f"{group}=") for word in words)
        if not asked and any((place / group / f"{name}.yaml").is_file() for place in places):
            chosen.append(f"{group}={name}")
    multirun = bool({"-m", "--multirun"} & set(words))
    if not multirun and not any(word.startswith("hydra.run.dir=") for word in words):
        chosen += [f"hydra.run.dir={quoted(str(folder))}", "hydra.output_subdir=null"]
    return [*words, *chosen]


def warm_start_word(word: str) -> str:
    """``warm_start=PATH`` as ``warm_start.path=PATH``, since the option is a group of values; other words as they are.

    The path of a checkpoint has a = in its name, which Hydra reads only in quotes.
    """
    name, equals, value = word.partition("=")
    if name != "warm_start" or not equals:
        return word
    plain = "=" in value and "," not in value and value[:1] not in ("'", '"')
    return f"warm_start.path={quoted(value) if plain else value}"


def resumed(cfg: DictConfig, saved: DictConfig, overrides: list[str], *, conf: Path) -> DictConfig:
    """The configuration of a run that goes on: what was saved, with the values given now and what follows from them.

    Args:
        cfg: the configuration as composed from this command line, with the groups of the run.
        saved: the resolved configuration of the run folder.
        overrides: this command line's overrides, such as ``["resume=runs/x", "train.max_steps=500"]``.
        conf: the folder of the configuration files.

    Raises:
        UserError: an override of something that cannot change in a resumed run, or that the run does not have.
    """
    before, merged, keys = cfg.copy(), saved.copy(), []
    for each in (before, merged):
        OmegaConf.set_struct(each, False)
    for override in parse(overrides):
        key, line = str(override.key_or_group), override.input_line
        if key in ("resume", "force", "trust") or key.startswith("hydra"):
            continue
        if key in ("logger", "metrics"):
            merged[key] = OmegaConf.to_container(cfg[key], resolve=True)
            continue
        if key == "trainer":  # the rest of a trainer, such as its precision, can be given by itself
            for name in WHERE:
                merged.trainer.pop(name, None)
                if name in cfg.trainer:  # a trainer of the user's own may leave it to Lightning
                    merged.trainer[name] = _plain(cfg.trainer[name])
            continue
        if (conf / key).is_dir():
            name = OmegaConf.select(saved, f"{key}.name")
            if name is None or name != OmegaConf.select(cfg, f"{key}.name"):
                raise UserError(f"resume goes on with the saved {key}; '{line}' would start another run: leave it out")
            continue
        asked, known = (_plain(OmegaConf.select(each, key)) for each in (cfg, saved))
        if asked == known:
            continue
        if not is_below(key, RESUMABLE) or is_below(key, NOT_RESUMABLE):
            raise UserError(f"{key} is {known} and cannot change when a run resumes; without '{line}' it goes on")
        keys.append(key)
        OmegaConf.update(before, key, known, force_add=True)
        OmegaConf.update(merged, key, asked, force_add=True)
    if keys:
        old, new = (dict(_leaves(OmegaConf.to_container(each, resolve=True))) for each in (before, cfg))
        for key in (name for name in new if new[name] != old.get(name)):
            OmegaConf.update(merged, key, new[key], force_add=True)
    merged.resume, merged.trust = cfg.resume, cfg.trust
    merged.lr = learning_rate(merged)
    return merged


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


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def quoted(text: str) -> str:
    """A value as Hydra's grammar reads it, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
