"""The parts of a run that need no run folder: log, data module, and model with its losses and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker.config import base_lr
from ranker.data.datamodule import RankingDataModule
from ranker.data.log import Log, Selected
from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.losses import MultitaskLoss, RankingLoss
from ranker.metrics import Intervals, RowMetric, TaskMetrics
from ranker.models import Ranker
from ranker.runs import lineage
from ranker.training.module import RankingModule
from ranker.training.warm_start import settings_of as warm_start_settings

_LOGGER = logging.getLogger(__name__)


def open_log(cfg: DictConfig) -> Log:
    """The log, with the tasks and features that were chosen."""
    log: Log = instantiate(cfg.data.log, _convert_="all")
    chosen = log.schema.select(
        tasks=_names(cfg.data.tasks),
        features=_names(cfg.data.features),
        drop_features=_names(cfg.data.drop_features) or (),
    )
    return log if chosen == log.schema else Selected(log, chosen)


def make_net(cfg: DictConfig, schema: Schema) -> Ranker:
    """The model, with new random weights."""
    return instantiate(cfg.model.net, _convert_="all")(schema)


def build_data(cfg: DictConfig, log: Log, **other: Any) -> RankingDataModule:
    """The data module of a log.

    Args:
        cfg: the configuration.
        log: the log.
        other: arguments of ``RankingDataModule`` that the configuration does not decide, or that replace what it says.
    """
    configured: dict[str, Any] = {
        "batch_size": cfg.scale.batch_size,
        "eval_batch_size": cfg.scale.eval_batch_size,
        "window": cfg.data.window,
        "seed": cfg.seed,
        "num_workers": cfg.data.num_workers,
        "eval_max_rows": cfg.data.eval_max_rows,
        "progressive": cfg.train.progressive,
        "dense_statistics": cfg.data.dense_statistics,
        "passes": cfg.train.get("epochs", 1),  # missing in old runs
        "keep_groups": cfg.data.get("keep_groups"),  # likewise
        "strips": cfg.data.get("strips", 1),  # likewise
        "windows_before": int((lineage.parent(cfg) or {}).get("windows", 0)),
    }
    return RankingDataModule(log, **(configured | other))


def build_module(cfg: DictConfig, schema: Schema) -> RankingModule:
    """The model with its losses, metrics and optimizer, with new random weights."""
    lr = base_lr(cfg) * cfg.lr_mult
    if OmegaConf.select(cfg, "embeddings.name", default="local") == "torchrec":  # missing in old runs
        from ranker.training import sharded_config  # late: few runs need it

        net, tables = sharded_config.sharded(cfg, lambda: make_net(cfg, schema), lr=lr)
    else:
        net, tables = make_net(cfg, schema), None
    return RankingModule(
        net,
        schema=schema,
        loss=make_loss(cfg, schema),
        metrics=metrics_factory(cfg, schema),
        optimizer=instantiate(cfg.optim, _convert_="all"),
        lr=lr,
        warmup_steps=cfg.train.warmup_steps,
        rewarm_steps=warm_start_settings(cfg).warmup_steps,
        average_decay=cfg.train.get("average_decay", 0.0),  # missing in old runs
        before=lineage.parent(cfg),
        head_bias=cfg.train.head_bias,
        progressive=cfg.train.progressive,
        score_rows=cfg.scale.eval_batch_size,
        log_every=cfg.train.log_every,
        compile_net=cfg.train.compile,
        tables=tables,
    )


def make_loss(cfg: DictConfig, schema: Schema) -> MultitaskLoss:
    """The training loss. Configurations of older versions have the pointwise one.

    Raises:
        UserError: the log has no group for a ranking loss, or an option is wrong.
    """
    node = OmegaConf.select(cfg, "loss.ranking", default=None)
    return MultitaskLoss(schema, None if node is None else _made(node, "loss.ranking", RankingLoss))


def metrics_factory(cfg: DictConfig, schema: Schema) -> Callable[[], TaskMetrics]:
    """Makes the metrics on the hold-out. Configurations of older versions have the default ones.

    Raises:
        UserError: a metric needs a group or a feature that the log does not have, or an option is wrong.
    """
    nodes = OmegaConf.select(cfg, "metrics.extra", default=None) or {}
    extra: dict[str, RowMetric] = {
        str(name): _made(node, f"metrics.extra.{name}", RowMetric) for name, node in nodes.items() if node is not None
    }
    options = OmegaConf.select(cfg, "metrics.intervals", default=None)
    intervals = Intervals(**options) if options else None
    idle = [
        name
        for name, metric in extra.items()
        if not any(metric.names(schema, task) for task in schema.tasks if task.type in metric.types)
    ]
    if idle and getattr(rank_zero_only, "rank", 0) == 0:
        _LOGGER.warning(
            "metrics.extra: %s compute nothing: schema '%s' has %s",
            ", ".join(idle),
            schema.name,
            "no such task"
            if schema.groups
            else "no group (add groups: [{name: user, column: user_id}]) or no such task",
        )
    return lambda: TaskMetrics(schema, extra=list(extra.values()), intervals=intervals)


def _made(node: Any, where: str, kind: type) -> Any:
    try:
        made = instantiate(node, _convert_="all")
    except TypeError as error:  # an argument that the class does not have
        raise UserError(f"{where}: {error}") from error
    except InstantiationException as error:
        if isinstance(error.__cause__, TypeError):
            raise UserError(f"{where}: {error.__cause__}") from error
        raise
    if not isinstance(made, kind):
        raise UserError(f"{where} is no {kind.__name__}; it needs a _target_ that names one")
    return made


def _names(value: Any) -> list[str] | None:
    if value is None or isinstance(value, str):  # data.tasks=click is one name
        return None if value is None else [value]
    with open_dict(value):
        return [str(name) for name in value]
