"""Every use of torchrec and fbgemm: planning where the rows of tables go, and the modules that look them up.

torchrec is no dependency: it costs seconds at each start, and it must fit the installed torch exactly. So it is
imported when the first table is sharded, and nowhere else.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranker.errors import UserError, one_of

PLANS = ("auto", "table_wise", "row_wise", "column_wise")
OPTIMIZERS = {"adagrad": "EXACT_ADAGRAD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD"}
INITS = ("as_local", "by_block")
_GIB = 2**30
_MULTIPLE = 4  # fbgemm reads rows in vectors of four floats


@dataclass(frozen=True, kw_only=True)
class ShardingSettings:
    """How tables are sharded and trained; see ``conf/embeddings/torchrec.yaml``.

    Attributes:
        plan: ``table_wise``, ``row_wise`` or ``column_wise`` for all tables; ``auto``: the planner chooses for each.
        tables: the plan of single tables, by name of the feature that owns it.
        optimizer: ``adagrad`` or ``rowwise_adagrad``, in the backward pass.
        initial_accumulator_value: G_0, where accumulators start.
        eps: added to the root of the accumulator.
        init: ``as_local`` or ``by_block``, see ``ShardedTables``.
        memory_gib: memory of a rank that tables may take, for the planner; None: torchrec's assumption.

    Raises:
        UserError: a value out of range.
    """

    plan: str = "auto"
    tables: Mapping[str, str] = field(default_factory=dict)
    optimizer: str = "adagrad"
    initial_accumulator_value: float = 1e-6
    eps: float = 1e-10
    init: str = "as_local"
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        one_of(self.plan, PLANS, "embeddings.plan")
        one_of(self.optimizer, tuple(OPTIMIZERS), "embeddings.optimizer")
        one_of(self.init, INITS, "embeddings.init")
        for name, plan in self.tables.items():
            one_of(plan, PLANS, f"embeddings.tables.{name}")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise UserError(f"embeddings.memory_gib must be above 0, got {self.memory_gib}")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table to shard.

    Attributes:
        name: of the feature that owns it.
        rows: number of rows.
        dim: width of a row.
        features: features that look rows up in it.

    Raises:
        UserError: the width is not a multiple of 4.
    """

    name: str
    rows: int
    dim: int
    features: Sequence[str]

    def __post_init__(self) -> None:
        if self.dim % _MULTIPLE:
            raise UserError(
                f"feature '{self.name}': embedding_dim {self.dim} is not a multiple of {_MULTIPLE}, which "
                "embeddings=torchrec needs"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The part of a table in this process: rows ``row .. row + len - 1``, columns ``column .. column + width - 1``.

    Attributes:
        table: name of the table.
        row: first row.
        column: first column.
        weight: [rows, columns]; the memory that the kernel updates.
        accumulator: of Adagrad, [rows, columns]; of row-wise Adagrad, [rows].
    """

    table: str
    row: int
    column: int
    weight: Tensor
    accumulator: Tensor


def require(name: str = "torchrec") -> ModuleType:
    """Imports torchrec or a module of it, without its warnings, which are about its own code.

    Raises:
        UserError: it is not installed, or does not fit the installed torch.
    """
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    logging.getLogger("torchrec").setLevel(logging.WARNING)
    # torchrec calls collectives by their former names, in the backward pass too.
    warnings.filterwarnings("ignore", message=".*`torch.distributed.*` is deprecated.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*deprecating ShardedTensor.*", category=FutureWarning)
    try:
        with _quiet():
            importlib.import_module("fbgemm_gpu")
            return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(
            f"embeddings=torchrec needs torchrec and fbgemm-gpu for torch {torch.__version__} "
            f"({' '.join(str(error).split())[:120]}); make setup-torchrec installs them into build/torchrec, see "
            "docs/sharded-tables.md"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torchrec and fbgemm, which log a page per table at level INFO, and warn of their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class ShardedCollection:
    """An ``EmbeddingBagCollection`` sharded over the processes of a group, with its optimizer in the backward pass.

    It is no ``nn.Module``, so that nobody takes its weights for parameters of the model: DDP would broadcast and
    average them, and the optimizer would ask for their gradients, which never exist.

    Args:
        tables: the tables.
        settings: how to shard and train them.
        lr: learning rate until ``set_learning_rate`` is called.
        group: the processes; all must call.
        device: where the rows are.

    Attributes:
        plan: lines that say where each table is.
        shards: what this process has.

    Raises:
        UserError: torchrec is missing, or the tables do not fit.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        settings: ShardingSettings,
        *,
        lr: float,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        torchrec, bags = require(), require("torchrec.distributed.embeddingbag")
        kinds = require("fbgemm_gpu.split_embedding_configs").EmbOptimType
        self._keyed_jagged: Callable[..., Any] = torchrec.KeyedJaggedTensor
        self._names = {f"t{number}": table.name for number, table in enumerate(tables)}  # ours may contain dots
        configs = [
            torchrec.EmbeddingBagConfig(
                name=f"t{number}",
                embedding_dim=table.dim,
                num_embeddings=table.rows,
                feature_names=list(table.features),
                pooling=torchrec.PoolingType.SUM,  # its MEAN divides by the length + 1e-6 where tables are row-wise
            )
            for number, table in enumerate(tables)
        ]
        fused = {
            "optimizer": getattr(kinds, OPTIMIZERS[settings.optimizer]),
            "learning_rate": lr,
            "eps": settings.eps,
        }
        sharder = _sharder(bags)(fused_params=fused)
        holder = nn.Module()
        holder.ebc = torchrec.EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        kinds_of = {f"t{number}": settings.tables.get(table.name, settings.plan) for number, table in enumerate(tables)}
        widths = {f"t{number}": table.dim for number, table in enumerate(tables)}
        plan = _plan(holder, sharder, kinds_of, widths, settings, group=group, device=device)
        self.plan = _described(plan.plan["ebc"], self._names)
        env = require("torchrec.distributed.types").ShardingEnv.from_process_group(group)
        with _quiet():
            self._module: Any = sharder.shard(holder.ebc, plan.plan["ebc"], env, device=device)
        self._kernels = [kernel for lookup in self._module._lookups for kernel in lookup._emb_modules]
        self.shards = [shard for kernel in self._kernels for shard in _shards(kernel, self._names)]
        for shard in self.shards:
            shard.accumulator.fill_(settings.initial_accumulator_value)

    def __call__(self, keys: list[str], values_N: Tensor, lengths: Tensor, *, stride: int) -> dict[str, Tensor]:
        """Sums of the rows of each list, [B, D], by feature. All processes must call it, each with the same ``stride``.

        Args:
            keys: features, in one order at all times.
            values_N: rows of all features, feature after feature.
            lengths: length of each list, int32 [features * stride].
            stride: B, lists per feature.
        """
        jagged = self._keyed_jagged(keys=keys, values=values_N, lengths=lengths, stride=stride)
        found = self._module(jagged).wait()
        return dict(zip(found.keys(), found.values().split(found.length_per_key(), dim=1), strict=True))

    def set_learning_rate(self, lr: float) -> None:
        """The rate of the backward passes from now on."""
        for kernel in self._kernels:
            kernel.emb_module.set_learning_rate(lr)

    def on_lookup(self, note: Callable[[int, Tensor], None]) -> None:
        """Has ``note(shard, rows)`` called before each lookup, with rows counted within the shard, as often as used.

        ``shard`` is its place in ``shards``.
        """
        first = 0
        for kernel in self._kernels:
            kernel.register_forward_pre_hook(_Noting(note, first, kernel))
            first += len(kernel._config.embedding_tables)

    def sharded_state(self) -> dict[str, Any]:
        """Weights and accumulators as sharded tensors by ``NAME/weight`` and ``NAME/accumulator``, not copied."""
        state: dict[str, Any] = {}
        for key, weight in self._module.state_dict().items():
            state[f"{self._names[key.split('.')[1]]}/weight"] = weight
        for key, values in self._module.fused_optimizer.state_dict()["state"].items():
            (accumulator,) = values.values()
            state[f"{self._names[key.split('.')[1]]}/accumulator"] = accumulator
        return state


class _Noting:
    """Hook before the lookup of one kernel: which rows of which shard it will read."""

    def __init__(self, note: Callable[[int, Tensor], None], first: int, kernel: Any) -> None:
        self._note, self._first = note, first
        self._features = [len(config.feature_names) for config in kernel._config.embedding_tables]

    def __call__(self, _kernel: Any, inputs: tuple[Any, ...]) -> None:
        jagged = inputs[0]
        values, ends = jagged.values(), jagged.offset_per_key()
        place = 0
        for number, count in enumerate(self._features):
            low, high = ends[place], ends[place + count]
            self._note(self._first + number, values[low:high])
            place += count


def _sharder(bags: ModuleType) -> Any:
    """The sharder of torchrec, with row-wise tables on the CPU too: gloo has the reduce-scatter that they need."""

    class Sharder(bags.EmbeddingBagCollectionSharder):  # type: ignore[name-defined]
        def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
            return list(PLANS[1:])

    return Sharder


def _plan(
    holder: nn.Module,
    sharder: Any,
    kinds: Mapping[str, str],
    widths: Mapping[str, int],
    settings: ShardingSettings,
    *,
    group: dist.ProcessGroup,
    device: torch.device,
) -> Any:
    """The plan of torchrec, equal on all processes.

    Raises:
        UserError: there is none.
    """
    planner = require("torchrec.distributed.planner")
    types = require("torchrec.distributed.planner.types")
    reserve = require("torchrec.distributed.planner.storage_reservations").FixedPercentageStorageReservation(0.0)
    size = group.size()
    capacity = {} if settings.memory_gib is None else {"ddr_cap": int(settings.memory_gib * _GIB)}
    if capacity and device.type == "cuda":
        capacity = {"hbm_cap": capacity["ddr_cap"]}
    constraints = {
        name: types.ParameterConstraints(
            sharding_types=list(PLANS[1:]) if kind == "auto" else [kind],
            compute_kernels=["fused"],  # the dense kernel of fbgemm for the CPU has no gradient
            min_partition=_narrowest(widths[name], size),
        )
        for name, kind in kinds.items()
    }
    try:
        with _quiet():
            return planner.EmbeddingShardingPlanner(
                topology=planner.Topology(world_size=size, compute_device=device.type, **capacity),
                constraints=constraints,
                storage_reservation=reserve,
            ).collective_plan(holder, [sharder], group)
    except (types.PlannerError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"embeddings: torchrec finds no plan for {len(kinds)} tables on {size} processes ({why}); choose another "
            "embeddings.plan, or raise embeddings.memory_gib"
        ) from error


def _narrowest(dim: int, processes: int) -> int:
    """Fewest columns of a column-wise shard: those of one part a process, as far as the width can be divided."""
    parts = next(n for n in range(min(processes, dim // _MULTIPLE), 0, -1) if not dim % (n * _MULTIPLE))
    return dim // parts


def _described(plan: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    lines = []
    for name, sharding in plan.items():
        places = ", ".join(
            f"rank {shard.placement.rank()}: {shard.shard_sizes[0]:,} x {shard.shard_sizes[1]}"
            for shard in sharding.sharding_spec.shards
        )
        lines.append(f"{names[name]}: {sharding.sharding_type} ({places})")
    return lines


def _shards(kernel: Any, names: Mapping[str, str]) -> list[Shard]:
    weights = kernel.emb_module.split_embedding_weights()
    states = kernel.emb_module.split_optimizer_states()
    return [
        Shard(
            table=names[config.name],
            row=config.local_metadata.shard_offsets[0],
            column=config.local_metadata.shard_offsets[1],
            weight=weight.detach(),
            accumulator=state[0],
        )
        for config, weight, state in zip(kernel._config.embedding_tables, weights, states, strict=True)
    ]
