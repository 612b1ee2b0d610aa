"""The typed root of the configuration: its checks, the base learning rate, and errors in it as one line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ranker.data.base_lr import read_base_lr
from ranker.errors import UserError, one_of, suggest
from ranker.hydra_private import read_yaml_in_c
from ranker.runs import config_identity, objective
from ranker.stability.detector_settings import DetectorSettings

ORDERS = ("shared", "own")  # of sweep.vectorize_order


@dataclass
class TrainSettings:
    """How long to train and how often to look. Units: steps are optimizer steps.

    Attributes:
        max_steps: stop after this many steps; -1 trains on every row once.
        epochs: passes over the training rows; more than one is for small logs.
        eval_every: evaluate on the hold-out every so many steps; 0 only at the end.
        progressive: score each window before it is trained on.
        checkpoint_every: write a checkpoint every so many steps, at the last step and where the hold-out is best;
            0 writes none but on interruption.
        checkpoint_rows_above: megabytes, with its accumulators, above which a table with sparse gradients is saved by
            the rows that moved since a full copy; 0 saves whole tables always.
        checkpoint_full_share: share of the rows of such tables that a checkpoint may hold before the next full copy.
        log_every: write metrics every so many steps.
        warmup_steps: raise the learning rate linearly from 0 over so many steps; 0 for none.
        head_bias: where the heads' biases start: ``labels``, at the constant that fits the first window best; ``zero``.
        average_decay: of a moving average of the dense weights, which is evaluated and exported; 0 for none.
        compile: run the model through torch.compile.
        threads: CPU threads of torch; 0 leaves torch's own choice.
    """

    max_steps: int = -1
    epochs: int = 1
    eval_every: int = 50
    progressive: bool = True
    checkpoint_every: int = 100
    checkpoint_rows_above: float = 256.0
    checkpoint_full_share: float = 0.25
    log_every: int = 10
    warmup_steps: int = 0
    head_bias: str = "labels"
    average_decay: float = 0.0
    compile: bool = False
    threads: int = 0


@dataclass
class WarmStartSettings:
    """What a new run takes over from an earlier one. ``warm_start=PATH`` is short for ``warm_start.path=PATH``.

    Attributes:
        path: a run folder, an export or a checkpoint; None starts with random weights.
        accumulators: ``keep``, ``reset``, ``decay`` or ``floor``; see ``ranker.training.accumulators``.
        half_life_rows: of ``decay``, rows after which half of what was accumulated is forgotten.
        floor: of ``floor``, the least accumulator of a layer, as a share of the layer's median.
        warmup_steps: raise the learning rate linearly from 0 over so many steps of the new run; 0 for none.
        at_windows: do the same to the accumulators and the rate at the end of each window of the run, and write a
            checkpoint there; see ``ranker.training.boundaries``.
        parent: what the parent is; written by the run.
    """

    path: str | None = None
    accumulators: str = "keep"
    half_life_rows: float | None = None
    floor: float = 0.1
    warmup_steps: int = 0
    at_windows: bool = False
    parent: dict[str, Any] | None = None


ACCUMULATORS = ("keep", "reset", "decay", "floor")


@dataclass
class SweepSettings:
    """How a multirun trains its jobs. Not part of what identifies a run.

    Attributes:
        vectorize: train up to so many jobs that differ only in seed, learning rate or optimizer as one; 1: none.
        vectorize_order: the order of the rows inside a window where the seeds differ. ``shared``: that of seed 0 for
            all; ``own``: each job has that of its own seed.
    """

    vectorize: int = 1
    vectorize_order: str = "shared"


@dataclass
class Root:
    """The whole configuration: groups chosen by name, and what belongs to no group."""

    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    scale: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    mitigation: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    embeddings: dict[str, Any] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)
    warm_start: WarmStartSettings = field(default_factory=WarmStartSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    seed: int = 0
    lr_mult: float = 1.0
    lr: float | None = None
    resume: str | None = None
    objective: str | None = None
    tags: list[str] = field(default_factory=list)
    force: bool = False
    trust: list[str] = field(default_factory=list)


def register() -> None:
    """Registers configs that are defined in Python: ``root``, and the detector's settings with their defaults."""
    store = ConfigStore.instance()
    store.store(name="root", node=Root)
    # As a plain dict, because OmegaConf makes a frozen dataclass read-only.
    store.store(group="callbacks/detector", name="settings", node=asdict(DetectorSettings()))


def base_lr(cfg: DictConfig) -> float:
    """The learning rate called 1x: that of the chosen data at the chosen scale.

    Raises:
        UserError: the data set gives none for this scale.
    """
    rates, scale = cfg.data.base_lr, cfg.scale.name
    if scale not in rates:
        raise UserError(f"data.base_lr has no entry for scale '{scale}'; {suggest(scale, map(str, rates))}")
    return float(rates[scale])


def learning_rate(cfg: DictConfig) -> float | None:
    """The learning rate of a run; None where the configuration is wrong, which ``check`` reports."""
    try:
        return base_lr(cfg) * float(cfg.lr_mult)
    except (UserError, OmegaConfBaseException, TypeError, ValueError):
        return None


def check(cfg: DictConfig) -> None:
    """Refuses values that would only fail later, before anything is built.

    Raises:
        UserError: a value is out of range.
    """
    if not (cfg.lr_mult > 0 and math.isfinite(cfg.lr_mult)):
        raise UserError(f"lr_mult must be a number above 0, got {cfg.lr_mult}; 1 is the base learning rate")
    if not base_lr(cfg) > 0:
        raise UserError(f"data.base_lr.{cfg.scale.name} must be above 0, got {base_lr(cfg)}")
    if "lr" in cfg and cfg.lr != learning_rate(cfg):
        raise UserError(f"lr is data.base_lr.{cfg.scale.name} times lr_mult and not set itself; change one of those")
    if cfg.seed < 0:
        raise UserError(f"seed must be 0 or more, got {cfg.seed}")
    if cfg.scale.batch_size < 1:
        raise UserError(f"scale.batch_size must be 1 or more, got {cfg.scale.batch_size}")
    for name in ("eval_every", "checkpoint_every", "warmup_steps", "threads"):
        if cfg.train[name] < 0:
            raise UserError(f"train.{name} must be 0 or more, got {cfg.train[name]}")
    if cfg.train.get("epochs", 1) < 1:
        raise UserError(f"train.epochs must be 1 or more, got {cfg.train.epochs}")
    if "sweep" in cfg:  # missing in old runs
        if cfg.sweep.vectorize < 1:
            raise UserError(f"sweep.vectorize must be 1 or more, got {cfg.sweep.vectorize}")
        one_of(cfg.sweep.vectorize_order, ORDERS, "sweep.vectorize_order")
    if cfg.train.log_every < 1:
        raise UserError(f"train.log_every must be 1 or more, got {cfg.train.log_every}")
    if cfg.train.max_steps < -1 or cfg.train.max_steps == 0:
        raise UserError(f"train.max_steps must be -1 (all passes) or more than 0, got {cfg.train.max_steps}")
    if not (0 <= cfg.train.get("checkpoint_rows_above", 0) < math.inf):
        raise UserError(
            f"train.checkpoint_rows_above must be 0 (never) or more MB, got {cfg.train.checkpoint_rows_above}"
        )
    if not 0 < cfg.train.get("checkpoint_full_share", 1) <= 1:
        raise UserError(
            f"train.checkpoint_full_share must be above 0 and at most 1, got {cfg.train.checkpoint_full_share}"
        )
    if "embeddings" in cfg and cfg.embeddings.get("name", "local") == "local" and len(cfg.embeddings) > 1:
        other = next(name for name in cfg.embeddings if name != "name")
        raise UserError(
            f"embeddings.{other} is for sharded tables, and embeddings=local shards none; add embeddings=torchrec"
        )
    if not 0 <= cfg.train.get("average_decay", 0) < 1:
        raise UserError(
            f"train.average_decay must be 0 (none) or below 1, such as 0.999, got {cfg.train.average_decay}"
        )
    if "warm_start" in cfg:  # missing in old runs
        _check_warm_start(cfg.warm_start)
        if cfg.warm_start.get("at_windows") and cfg.trainer.accumulate_grad_batches != 1:
            raise UserError("warm_start.at_windows needs trainer.accumulate_grad_batches=1: a step is of one window")


def _check_warm_start(given: DictConfig) -> None:
    one_of(given.accumulators, ACCUMULATORS, "warm_start.accumulators")
    half_life = given.half_life_rows
    if given.accumulators == "decay" and not (half_life is not None and half_life > 0):
        raise UserError(
            f"warm_start.accumulators=decay needs warm_start.half_life_rows above 0, such as 1e7, got {half_life}"
        )
    if not (given.floor > 0 and math.isfinite(given.floor)):
        raise UserError(f"warm_start.floor must be a number above 0, got {given.floor}")
    if given.warmup_steps < 0:
        raise UserError(f"warm_start.warmup_steps must be 0 or more, got {given.warmup_steps}")


def is_sweep() -> bool:
    """Whether what runs now is a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def outside_folder() -> list[str]:
    """The arguments ``--config-dir DIR`` of this command line, for the processes that it starts; empty without."""
    sources = HydraConfig.get().runtime.config_sources
    return [word for source in sources if source.provider == "command-line" for word in ("--config-dir", source.path)]


def _register_resolvers() -> None:
    config_identity.register()
    OmegaConf.register_new_resolver("base_lr_of_log", read_base_lr, replace=True)
    OmegaConf.register_new_resolver("learning_rate", lambda *, _root_: learning_rate(_root_), replace=True)
    OmegaConf.register_new_resolver(
        "objective_direction", lambda *, _root_: objective.direction(_root_.objective), replace=True
    )


# At import, because a worker of a parallel sweep imports this module and calls nothing.
_register_resolvers()
read_yaml_in_c()


def one_line(error: BaseException) -> str:
    """What went wrong in one line, from whatever Hydra or OmegaConf wrapped around it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, OverrideParseException) and "=" in str(cause.override):
            name, text = str(cause.override).split("=", 1)
            return (
                f"'{cause.override}' cannot be read; a value with =, ~, brackets or letters beyond ASCII needs quotes "
                f"of its own: '{name}=\"{text}\"'"
            )
        if isinstance(cause, MissingConfigException) and cause.options is not None:
            missing = cause.missing_cfg_file
            name = missing[0] if isinstance(missing, (list, tuple)) else str(missing)
            group, _, choice = name.rpartition("/")
            options = [option for option in cause.options if not option.startswith("_")]  # _base is no option
            return f"unknown {group or 'config'} '{choice}'; {suggest(choice, options)}"
        key, parent = getattr(cause, "key", None), getattr(cause, "parent_node", None)
        if isinstance(cause, OmegaConfBaseException) and isinstance(parent, DictConfig) and key not in parent:
            where = getattr(cause, "full_key", None) or key
            return f"unknown option '{where}'; {suggest(str(key), map(str, parent))}"
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    root = error.__cause__ or error
    detail = [line.strip() for line in str(root).splitlines() if line.strip()] if root is not error else []
    told = [line for line in (*lines[:1], *detail[:1], *lines[1:2]) if not line.startswith("Set the environment")]
    return "; ".join(dict.fromkeys(told)) or type(error).__name__
