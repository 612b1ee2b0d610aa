"""Warm start: a new run that begins with the weights, the accumulators and the history of an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ranker.config import WarmStartSettings
from ranker.data.datamodule import RankingDataModule
from ranker.data.dense_statistics import NOTHING, DenseStatistics
from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.models.admission import admission_of, has_rule
from ranker.runs.checkpoint_files import damage
from ranker.runs.config_identity import config_hash
from ranker.runs.lineage import LINEAGE, iso
from ranker.runs.run_folder import (
    AVERAGE,
    CALLBACKS,
    CONFIG,
    DATA_MODULE,
    GLOBAL_STEP,
    NET_PREFIX,
    SCHEMA,
    SHARDED,
    STABILITY,
    STATE_DICT,
    TRAIN_AUC,
    TRAIN_AUC_BY_RANK,
    RunFolder,
)
from ranker.stability.carried_state import is_lost
from ranker.training import accumulators, weight_transfer
from ranker.training.fit import Fit
from ranker.training.module import RankingModule
from ranker.training.optimizer_transfer import StateByName
from ranker.training.resumption import sound_checkpoint
from ranker.training.stability_callback import Stability
from ranker.training.table_checkpoints import read_checkpoint
from ranker.trust import read_config

if TYPE_CHECKING:
    from ranker.training.stored_tables import StoredTable


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The state of the run that a new one continues, on the CPU.

    Attributes:
        identity: what is told about it: kind, path, run, config_hash, step, steps, windows, rows, last_time_ms.
        net: the weights.
        schema: its features and tasks; None if they are not known (a checkpoint of an older version).
        statistics: of the dense features, after its last window.
        optimizer: the optimizer's state by parameter; None for an export, which has none.
        groups: settings of the optimizer's groups, with ``param_names``.
        detector: state of the divergence detector; None without one.
        average: moving average of the dense weights; empty without one.
        tables: of a new run that shards its tables: those of the parent, not read yet, which ``net`` and ``optimizer``
            do not have then; None for any other run.
        auc: histograms of the training AUC, [ranks, T, 2, bins]; None for an export.
        own_rows: rows that it was trained on itself.
    """

    identity: dict[str, Any]
    net: Mapping[str, Tensor]
    schema: Schema | None
    statistics: DenseStatistics = NOTHING
    optimizer: StateByName | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    detector: Mapping[str, Any] | None = None
    average: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Mapping[str, StoredTable] | None = None
    auc: Tensor | None = None
    own_rows: int = 0

    @classmethod
    def of_run(cls, path: Path, *, say: Callable[[str], None], shards: bool = False) -> Parent:
        """The last state of a run, or of a lost run the last one from before its divergence.

        Args:
            path: its folder.
            say: told in one line where a lost run goes on.
            shards: the new run shards its tables.

        Raises:
            UserError: it has no checkpoint, or none from before its divergence.
        """
        folder = RunFolder.existing(path)
        return cls.of_checkpoint(sound_checkpoint(folder, keep_lost=False, say=say), kind="run", shards=shards)

    @classmethod
    def of_checkpoint(cls, path: Path, *, kind: str = "checkpoint", shards: bool = False) -> Parent:
        """The state in a checkpoint. What the file does not say of itself is read from its run folder, if it is in one.

        Sharded tables are gathered in this process, unless the new run shards its tables too.

        Args:
            path: the file.
            kind: of what is said about it.
            shards: the new run shards its tables.

        Raises:
            UserError: the file is damaged or no checkpoint of a run, or the detector had found the model lost.
        """
        if reason := damage(path):
            raise UserError(f"warm_start: {path} is {reason}; give another one")
        try:
            saved = read_checkpoint(path, light=shards)
            state, step, data = saved[STATE_DICT], int(saved[GLOBAL_STEP]), saved[DATA_MODULE]
            optimizer = saved["optimizer_states"][0]
        except Exception as error:  # torch raises many types of errors for an invalid file
            why = " ".join(str(error).split())[:120]
            raise UserError(f"warm_start: {path} is not a checkpoint of a run ({why})") from error
        detector = saved.get(CALLBACKS, {}).get(STABILITY, {}).get("detector")
        if detector is not None and is_lost(detector):
            raise UserError(f"warm_start: the model in {path} is lost (it diverged before); give an earlier checkpoint")
        folder = next((p for p in list(path.resolve().parents)[1:3] if (p / CONFIG).is_file()), None)
        lineage = dict(saved.get(LINEAGE, {}))  # missing in older checkpoints
        described = lineage.pop("schema", None)
        schema = Schema.from_dict(described, source=str(path)) if described else None
        if schema is None and folder is not None and (folder / SCHEMA).is_file():
            schema = Schema.from_yaml(folder / SCHEMA)
        net = {name.removeprefix(NET_PREFIX): x for name, x in state.items() if name.startswith(NET_PREFIX)}
        held, tables = accumulators.by_name(optimizer), None
        groups: list[dict[str, Any]] = optimizer["param_groups"]
        if shards or SHARDED in saved:
            from ranker.training import stored_tables  # late: few runs have sharded tables

            if SHARDED in saved:
                tables = stored_tables.of_sharded(saved, path)
                groups = stored_tables.groups_as_local(groups, tables)
            elif schema is not None:
                tables = stored_tables.of_local(path, schema)
            else:
                raise UserError(f"warm_start: {path} does not say its schema; give the run folder that it is of")
            if shards:
                net, held = ({n: x for n, x in y.items() if not stored_tables.is_table(n)} for y in (net, held))
            else:
                net |= stored_tables.whole(tables.values(), "weight")
                sums = stored_tables.whole(tables.values(), "accumulator")
                held, tables = {**held, **{name: {"sum": x} for name, x in sums.items()}}, None
        known = data.get("dense_statistics")
        own_rows = int(lineage.pop("own_rows", saved.get(CALLBACKS, {}).get("Bookkeeping", {}).get("examples", 0)))
        identity = {
            "kind": kind,
            "path": str(path.resolve() if folder is None or kind == "checkpoint" else folder),
            "run": None if folder is None else folder.name,
            "config_hash": None if folder is None else config_hash(read_config(folder / CONFIG)),
            "step": step,
            "steps": step,
            "windows": 0,
            "rows": own_rows,
            "last_time_ms": None,
            **lineage,
        }
        return cls(
            identity=identity,
            net=net,
            schema=schema,
            statistics=NOTHING if known is None else DenseStatistics.from_state(known),
            optimizer=held,
            groups=groups,
            detector=detector,
            average=saved.get(AVERAGE, {}),
            tables=tables,
            auc=saved.get(TRAIN_AUC_BY_RANK, state[TRAIN_AUC][None]),
            own_rows=own_rows,
        )

    def __str__(self) -> str:
        """What it is, in words."""
        at = self.identity
        name = at["run"] or at["path"]
        last = f", last row {iso(at['last_time_ms'])}" if at["last_time_ms"] is not None else ""
        return f"{at['kind']} {name}, step {at['step']}{last}"


class WarmStart:
    """Puts the state of a parent into a run that is about to start.

    Args:
        parent: the state.
        settings: what happens to the accumulators.
        module: the module of the new run, as it was built.
        normalises: whether the new run normalises dense features.

    Attributes:
        lines: what was not taken over as it was, one line each.

    Raises:
        UserError: nothing fits, or the parent was trained on inputs of another scale, or has no accumulators to keep.
    """

    def __init__(self, parent: Parent, settings: WarmStartSettings, *, module: RankingModule, normalises: bool) -> None:
        self.parent, self._settings = parent, settings
        path = parent.identity["path"]
        self._old_schema = parent.schema or module.schema
        self._plan = weight_transfer.plan(module.net, module.schema, parent.net, self._old_schema)  # type: ignore[arg-type]
        sources = [m.source for name, m in self._plan.moves.items() if not name.startswith("embeddings.")]
        if not any(parent.net[source].ndim > 1 for source in sources):
            raise UserError(f"warm_start: no layer of {path} fits this model; check model= and its widths")
        if normalises != bool(parent.statistics.rows):
            there, here = ("none", "past_windows") if normalises else ("past_windows", "none")
            raise UserError(
                f"warm_start: {path} was trained with data.dense_statistics={there} and this run has {here}, so its "
                "inputs have another scale; use the same value"
            )
        self._rows: Mapping[str, weight_transfer.Kept] = {}  # of sharded tables
        if module.tables is not None:
            assert parent.tables is not None
            self._rows, fresh = module.tables.kept_rows(module.schema, self._old_schema, parent.tables)
            self._plan = replace(self._plan, fresh=(*self._plan.fresh, *fresh))
        self._tasks = weight_transfer.same_tasks(module.schema, self._old_schema)
        self.lines = [f"starts fresh: {line}" for line in self._plan.fresh]
        self.lines += weight_transfer.rescaled_features(module.schema, self._old_schema)
        if self._plan.dropped:
            few = ", ".join(self._plan.dropped[:3]) + (", ..." if len(self._plan.dropped) > 3 else "")
            self.lines.append(f"not used here: {len(self._plan.dropped)} tensors of the earlier model ({few})")
        if settings.accumulators != "reset" and parent.optimizer is None:
            raise UserError(
                f"warm_start: {path} is an export, which has no accumulators; add warm_start.accumulators=reset, or "
                "give the run folder or a checkpoint"
            )
        if module.tables is not None and parent.tables is not None and settings.accumulators != "reset":
            self.lines += module.tables.other_accumulators(parent.tables, self._rows)

    @property
    def summary(self) -> dict[str, Any]:
        """What stands in summary.json."""
        return {
            **self.parent.identity,
            "last_row_time": iso(self.parent.identity["last_time_ms"]),
            "accumulators": self._settings.accumulators,
            "tensors": len(self._plan.moves) + len(self._rows),
            "not_as_it_was": self.lines,
        }

    def history(self, stability: Stability) -> None:
        """Lets the detector go on where the parent's was. Call it before the fit."""
        if self.parent.detector is not None:
            stability.carry_on(
                self.parent.detector,
                steps=int(self.parent.identity["step"]),
                tasks=self._tasks,
                step_cut=self._settings.accumulators == "keep" and not self._plan.fresh,
            )

    @torch.no_grad()
    def __call__(self, fit: Fit) -> None:
        """Puts weights, accumulators, training AUC and dense statistics into a fit whose optimizer was just made."""
        module = fit.module
        state = module.net.state_dict()
        for name, move in self._plan.moves.items():
            move.copy(state[name], self.parent.net[move.source])
        admission = admission_of(module.net)
        if admission is not None:
            admission.begin_run()
            counted = admission.counts_in(self._plan.moves)
            had_counts = {f.name: has_rule(f) and counted for f in self._old_schema.categorical}
            # Of a table without a rule the parent used every row.
            admission.admit_all([name for name in admission.names if not had_counts.get(name, counted)])
        if self._settings.accumulators != "reset" and self.parent.optimizer is not None:
            old = accumulators.changed(
                self.parent.optimizer, self.parent.groups, self._settings, rows=self.parent.own_rows
            )
            lost = accumulators.put(old, self._plan.moves, self.parent.groups, module, fit.trainer.optimizers[0])
            self.lines += lost
        if module.tables is not None and self.parent.tables is not None:
            keeps = self._settings.accumulators != "reset"
            module.tables.take_over(self.parent.tables, self._rows, self._changed_sums if keeps else None)
        self._carry_auc(fit)
        self._carry_average(module)
        fit.data.carry_statistics(self._statistics(module.schema, fit.data))

    def _changed_sums(self, parameter: str, sums: Tensor) -> Tensor:
        """Accumulators of sharded tables as they begin here, given the name of their local weight."""
        old = {parameter: {"sum": sums}}
        how = accumulators.changed(old, self.parent.groups, self._settings, rows=self.parent.own_rows)
        return how[parameter]["sum"]

    def _carry_average(self, module: RankingModule) -> None:
        """The moving average goes on; what is not taken over as it was starts from the weights."""
        whole = {name: move.source for name, move in self._plan.moves.items() if not move.axes}
        known = self.parent.average
        module.start_average({name: known[source] for name, source in whole.items() if source in known})

    def _carry_auc(self, fit: Fit) -> None:
        """Each rank's histograms where the number of ranks is the same, otherwise their sum on the first one."""
        auc, by_rank = fit.module.train_auc, self.parent.auc
        own = auc.get_extra_state()
        if by_rank is None or by_rank.shape[2:] != own.shape[1:]:
            return
        rank, same = fit.trainer.global_rank, len(by_rank) == fit.trainer.world_size
        old = by_rank[rank] if same else by_rank.sum(0) if rank == 0 else torch.zeros_like(by_rank[0])
        new = torch.zeros(own.shape)
        names, old_names = fit.module.schema.task_names, self._old_schema.task_names
        for task in self._tasks:
            new[names.index(task)] = old[old_names.index(task)]
        auc.set_extra_state(new.to(own.device))

    def _statistics(self, schema: Schema, data: RankingDataModule) -> DenseStatistics:
        """The parent's statistics in the order of this schema. A new feature has those of the first window."""
        known = self.parent.statistics
        names, old_names = ([f.name for f in s.dense] for s in (schema, self._old_schema))
        if not known.rows or names == old_names:
            return known
        places = [old_names.index(name) if name in old_names else -1 for name in names]
        window = DenseStatistics.of(data.log.read(*data.plan.rows(0)))
        scale = known.rows / max(window.rows, 1)
        mean = [known.mean_F[p] if p >= 0 else window.mean_F[i] for i, p in enumerate(places)]
        squares = [known.squares_F[p] if p >= 0 else window.squares_F[i] * scale for i, p in enumerate(places)]
        return DenseStatistics.from_state(
            {"rows": known.rows, "mean": torch.tensor(mean).double(), "squares": torch.tensor(squares).double()}
        )


def settings_of(cfg: Any) -> WarmStartSettings:
    """The typed settings of a composed or saved configuration; the defaults where an old one has none."""
    found = OmegaConf.select(cfg, "warm_start")
    return WarmStartSettings(**(OmegaConf.to_container(found, resolve=True) if found is not None else {}))  # type: ignore[arg-type]
