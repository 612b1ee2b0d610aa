"""``embeddings=torchrec`` in a configuration: the settings of the tables, and what cannot be combined with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.models import Ranker
from ranker.models.embeddings import tables_made_by
from ranker.models.sharded_embeddings import ShardedTables
from ranker.models.sharding import ShardingSettings, require
from ranker.training.sharded_tables import TablesOfRun

_OF_TABLES = ("method", "lr", "eps", "initial_accumulator_value")  # what optim.embedding may set of fused Adagrad
_STRATEGIES = ("auto", "ddp", "ranker.training.ddp.WatchedDDP", "pytorch_lightning.strategies.DDPStrategy")


def sharded(cfg: DictConfig, make_net: Callable[[], Ranker], *, lr: float) -> tuple[Ranker, TablesOfRun]:
    """A net whose tables are sharded, and what its module does with them.

    Args:
        cfg: a configuration with ``embeddings=torchrec``.
        make_net: makes the net.
        lr: learning rate of the run.

    Raises:
        UserError: torchrec is missing, or something cannot be combined with sharded tables.
    """
    for reason in refused(cfg):
        raise UserError(f"embeddings=torchrec: {reason}")
    own = dict(cfg.optim.embedding)
    group: dict[str, Any] = {"method": "adagrad", "lr": float(own.get("lr") or lr)}
    group |= {name: float(own[name]) for name in ("eps", "initial_accumulator_value")}
    given: Any = OmegaConf.to_container(cfg.embeddings, resolve=True)
    del given["name"]
    given |= {name: group[name] for name in ("eps", "initial_accumulator_value")}
    try:
        settings = ShardingSettings(**given)
    except TypeError as error:  # an option that there is not
        raise UserError(f"embeddings: {error}") from error

    def make(schema: Schema) -> ShardedTables:
        known = [f.name for f in schema.categorical if not f.table]
        for name in settings.tables:
            if name not in known:
                raise UserError(f"embeddings.tables: no table '{name}'; tables: {', '.join(known)}")
        return ShardedTables(schema, settings, seed=int(cfg.seed), lr=float(group["lr"]))

    with tables_made_by(make):
        net = make_net()
    if not isinstance(net.embeddings, ShardedTables):
        raise UserError(
            f"embeddings=torchrec: {type(net).__name__} makes tables of its own; use ranker.models.Ranker's"
        )
    require()  # last, so that a missing package hides no mistake in the configuration
    return net, TablesOfRun(net.embeddings, group)


def refused(cfg: DictConfig) -> Iterator[str]:
    """Why settings cannot be combined with sharded tables, each with what to do.

    The tables move in the backward pass. So nothing can look at their gradients first, or do without the step.
    """
    yield from _of_optimizer(cfg)
    yield from _of_trainer(cfg)
    yield from _of_callbacks(cfg)
    if cfg.train.get("compile"):
        yield "train.compile=true is not supported; leave it out"
    if OmegaConf.select(cfg, "model.net.sparse_embeddings"):
        yield "model.net.sparse_embeddings has no effect: the tables have no gradients; leave it out"


def _of_optimizer(cfg: DictConfig) -> Iterator[str]:
    own = cfg.optim.get("embedding")
    if own is None or own.get("method", "adagrad") != "adagrad":
        method = "that of the layers" if own is None else own.get("method")
        yield f"tables are trained by Adagrad in the backward pass, not by {method}; set optim.embedding.method=adagrad"
        return
    for name, value in own.items():
        if name not in _OF_TABLES and value:
            yield f"optim.embedding.{name}={value} is not supported; it may have {', '.join(_OF_TABLES)}"
    for name in ("eps", "initial_accumulator_value"):
        if own.get(name) is None:
            yield f"set optim.embedding.{name}"
    if cfg.optim.get("name") == "adagrad" and cfg.optim.get("weight_decay") and own.get("weight_decay") is None:
        yield "optim.weight_decay would hold for the tables too; set optim.embedding.weight_decay=0"
    if cfg.optim.get("maximize"):
        yield "optim.maximize is not supported; leave it out"
    if cfg.optim.get("on_nonfinite") == "skip":
        yield "optim.on_nonfinite=skip cannot leave out a step of the tables, which they have made by then; use raise"


def _of_trainer(cfg: DictConfig) -> Iterator[str]:
    trainer = cfg.trainer
    if trainer.get("accumulate_grad_batches", 1) != 1:
        yield "the tables would move at each batch; set trainer.accumulate_grad_batches=1 and a larger scale.batch_size"
    if trainer.get("gradient_clip_val"):
        yield "trainer.gradient_clip_val cannot see the tables' gradients; use optim=gc, agc or clippy"
    if str(trainer.get("precision", "32-true")) not in ("32-true", "32", "bf16-mixed"):
        yield f"trainer.precision={trainer.precision} is not supported; use 32-true or bf16-mixed"
    strategy = trainer.get("strategy", "auto")
    name = strategy.get("_target_") if isinstance(strategy, DictConfig) else strategy
    if name not in _STRATEGIES:
        yield f"the layers are trained by DDP, not by {name}; use trainer=ddp"


def _of_callbacks(cfg: DictConfig) -> Iterator[str]:
    def option(name: str) -> Any:
        return OmegaConf.select(cfg, f"callbacks.{name}", default=None)

    if option("sharpness.every"):
        yield "callbacks.sharpness looks on one rank alone, which cannot look rows up; set callbacks.sharpness.every=0"
    if option("snapshots.disk"):
        yield "snapshots of sharded tables are in memory only; set callbacks.snapshots.disk=0"
    if option("rollback.tries") and option("rollback.restore") == "accumulators":
        yield "callbacks.rollback.restore=accumulators is not supported; use restore=all"
