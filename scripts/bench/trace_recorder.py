"""Records a real training run for the detector's benchmark and the lead-time study: one file per run.

The run is the one that train.py makes of the same overrides: same model, batches and training step. Nothing stops it,
so that the file also shows what happens after a divergence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from optim import what_if
from optim.optimizer import SigmaOptimizer
from ranker import config
from ranker.data.batch import Batch
from ranker.data.datamodule import RankingDataModule
from ranker.data.schema import Schema
from ranker.metrics import TaskMetrics
from ranker.parts import build_module, open_log
from ranker.runs import provenance
from ranker.stability import LayerActivations, layer_signs, task_gradients
from ranker.training.module import RankingModule
from ranker.training.sharpness_probe import RATIO, SharpnessProbe
from ranker.training.training_step import clip_gradients, forward_loss, make_step_cut, step_signals
from recorded_runs import AFTER, BLOCK, FORMAT, LEARNED, LOG2_UNITS, NEAR, PAST, Array, Recorded, event_begins

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 128  # coordinates of G per matrix
WHAT_IF_EVERY = 5  # steps between two measurements of what other rules would do
RULES = {
    "gc": {"clip_norm": 0.1},
    "agc": {"clip_factor": 0.001},
    "lamb": {"trust_coefficient": 0.01},
    "clippy": {"lambda_rel": 0.1},
}


def configuration(overrides: Sequence[str]) -> DictConfig:
    """The configuration that train.py would compose."""
    config.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", overrides=[*overrides, "logger=none", "trainer=cpu"])
    config.check(cfg)
    return cfg


@dataclass
class Signs:
    """The early signs of a run, at every step.

    Args:
        module: what is trained.
        optimizer: its optimizer.
        rare_every: steps between two measurements of task cosine and sharpness; 0 for never.
    """

    module: RankingModule
    optimizer: SigmaOptimizer
    rare_every: int
    sharpness: bool = True
    names: dict[str, None] = field(default_factory=dict)
    rows: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        net = self.module.net
        roles: dict[str, str] = net.layer_names()  # type: ignore[operator]
        layers = {role: layer for role, layer in roles.items() if not role.startswith("head/")}
        self.shared: dict[str, nn.Parameter] = {}  # the weight of each layer below the heads
        self.names_of: dict[str, str] = {}
        for role, layer in layers.items():
            below = dict(net.get_submodule(layer).named_parameters(prefix=layer))
            name = max(below, key=lambda name: below[name].numel())
            self.shared[role], self.names_of[role] = below[name], name
        self.watched = LayerActivations(net, layers)
        self.probe = SharpnessProbe(every=self.rare_every, rows=256, hessian=False, max_products=8)
        self.seen: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether the costly signs are measured at a step."""
        return bool(self.rare_every) and step % self.rare_every == 0

    def after_forward(self, step: int, logits_BT: Tensor, batch: Batch) -> None:
        """Activations; at some steps the tasks' gradients."""
        for role, found in self.watched.compute().items():
            self.seen[f"{role}/activation_max"] = found.largest
            if found.dead is not None:
                self.seen[f"{role}/dead_relus"] = found.dead
        self.seen["logit_max"] = logits_BT.detach().abs().amax()
        if self.due(step) and "bottom_top" in self.shared:
            leaf_BT = logits_BT.detach().requires_grad_()
            loss = self.module.loss(leaf_BT, batch.labels_BT, batch.mask_BT)
            (slope_BT,) = torch.autograd.grad(loss.total, leaf_BT)
            columns = [(z * s).sum() for z, s in zip(logits_BT.unbind(1), slope_BT.unbind(1), strict=True)]
            cosine_TT = task_gradients(columns, [self.shared["bottom_top"]]).cosine_TT
            above = torch.triu(torch.ones_like(cosine_TT), diagonal=1).bool() & cosine_TT.isfinite()
            self.seen["task_cosine_min"] = cosine_TT[above].amin() if above.any() else cosine_TT.new_tensor(torch.nan)

    def before_step(self, step: int) -> None:
        """Gradients, and what other rules would do with them."""
        for role, signs in layer_signs(self.shared.items(), self.optimizer).items():
            self.seen |= {f"{role}/{name}": value for name, value in signs._asdict().items()}
        grads = [p.grad for p in self.module.net.parameters() if p.grad is not None and not p.grad.is_sparse]
        self.seen["grad_norm"] = nn.utils.get_total_norm(grads)
        if step % WHAT_IF_EVERY == 0:
            sigmas = what_if(self.optimizer, RULES, names=tuple(self.names_of.values()), read=False)
            for label, by_name in sigmas.items():
                self.seen |= {f"{role}/sigma_{label}": by_name[name] for role, name in self.names_of.items()}
        self.before = {role: weight.detach().clone() for role, weight in self.shared.items()}

    def after_step(self, step: int, batch: Batch) -> None:
        """What the step did; at some steps the sharpness. Ends the row of the step."""
        for role, weight in self.shared.items():
            moved = torch.linalg.vector_norm(weight.detach() - self.before[role])
            self.seen[f"{role}/update_norm"] = moved
            self.seen[f"{role}/update_over_weight"] = moved / torch.linalg.vector_norm(self.before[role])
        reported = self.optimizer.last_step()
        for role, name in self.names_of.items():
            if name in reported:
                self.seen[f"{role}/sigma"] = reported[name].sigma
        if self.sharpness and self.due(step):
            self.seen["sharpness_ratio"] = torch.tensor(
                self.probe.measure(self.module, self.optimizer, batch).get(RATIO, torch.nan)
            )
        self.names.update(dict.fromkeys(self.seen))
        self.rows.append({name: value.detach().float().reshape(()) for name, value in self.seen.items()})
        self.seen = {}

    def table(self) -> Array:
        """Steps by signs, float32; nan where a sign was not measured. The last rows may be missing."""
        missing = torch.tensor(torch.nan)
        return torch.stack([torch.stack([row.get(n, missing) for n in self.names]) for row in self.rows]).numpy()


class SampledG:
    """Adagrad's accumulator at some coordinates of each matrix outside embeddings and heads, after every step."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.matrices = {
            name: p
            for name, p in net.named_parameters()
            if p.ndim >= 2 and not name.startswith(("embeddings.", "heads."))
        }
        draw = torch.Generator().manual_seed(0)
        self.places = {
            name: torch.randperm(p.numel(), generator=draw)[:SAMPLE].sort().values for name, p in self.matrices.items()
        }
        self.rows: list[Array] = []

    def add(self) -> None:
        """Reads G. Nothing is read of an optimizer that keeps none."""
        found = []
        for name, p in self.matrices.items():
            state = self.optimizer.state.get(p, {})
            g = state.get("sum", state.get("exp_avg_sq"))
            if g is not None:
                found.append(g.detach().view(-1)[self.places[name]])
        if found:
            row = torch.cat(found).double().clamp(min=1e-60).log2().nan_to_num(nan=320.0, posinf=320.0)
            self.rows.append((row * LOG2_UNITS).round().clamp(-32_000, 32_000).to(torch.int32).numpy())

    def changes(self) -> Array:
        """int32 [N, P]: log2 of G in hundredths, each row but the first as its change from the row before."""
        if not self.rows:
            return np.zeros((0, 0), dtype=np.int32)
        table = np.stack(self.rows)
        return np.concatenate([table[:1], np.diff(table, axis=0)])

    def layers(self) -> list[str]:
        """Name of the parameter of each column."""
        return [name for name in self.matrices for _ in self.places[name]]


def record(
    overrides: Sequence[str], *, eval_every: int = 100, rare_every: int = 20, sharpness: bool = True
) -> Recorded:
    """Trains a run and keeps the signals and signs of every step.

    It ends ``AFTER`` steps after its first event. A run that has learned nothing by step 2 ``PAST``, without an event
    after step ``PAST``, ends there: it shows no mid-run event.

    Args:
        overrides: as for train.py.
        eval_every: steps between two evaluations on part of the hold-out; the whole of it is evaluated at the end.
        rare_every: steps between two measurements of task cosine and sharpness; 0 for never.
        sharpness: measure the sharpness too.
    """
    cfg = configuration(overrides)
    pl.seed_everything(cfg.seed, verbose=False)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    log = open_log(cfg)
    module = build_module(cfg, log.schema)
    made: Any = module.configure_optimizers()
    optimizer, schedule = (
        (made["optimizer"], made["lr_scheduler"]["scheduler"]) if isinstance(made, Mapping) else (made, None)
    )
    data = RankingDataModule(
        log,
        batch_size=cfg.scale.batch_size,
        eval_batch_size=cfg.scale.eval_batch_size,
        window=cfg.data.window,
        seed=cfg.seed,
        num_workers=cfg.data.num_workers,
        eval_max_rows=cfg.data.eval_max_rows,
        dense_statistics=cfg.data.dense_statistics,
    )
    module.start_heads(data)
    signs = Signs(module, optimizer, rare_every, sharpness)
    sampled, step_cut = SampledG(module.net, optimizer), make_step_cut(module.net, optimizer)
    blocks = TaskMetrics(log.schema)
    signals, rates, aucs, entropies = [], [], [], []
    evaluated: list[tuple[int, dict[str, float]]] = []
    held_out = data.val_dataloader()
    totals: list[float] = []
    last: int | None = None
    module.net.train()
    for step, batch in enumerate(data.train_dataloader(), start=1):
        rates.append(optimizer.param_groups[0]["lr"])
        looked = last is None or step <= last - AFTER + BLOCK  # signs long after an event tell nothing
        with signs.watched.measuring() if looked else nullcontext():
            logits_BT, loss = forward_loss(module, batch)
        given = step_signals(module, logits_BT, batch.labels_BT, batch.mask_BT, losses_T=loss.task_T)
        blocks.update(logits_BT, batch.labels_BT, batch.mask_BT)
        if looked:
            signs.after_forward(step, logits_BT, batch)
        optimizer.zero_grad()
        loss.total.backward()
        if cfg.trainer.gradient_clip_val:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            by_value = cfg.trainer.gradient_clip_algorithm == "value"
            clip_gradients(params, cfg.trainer.gradient_clip_val, by_value=by_value)
        if looked:
            signs.before_step(step)
        optimizer.step()
        signals.append(given.after_step(step_cut).packed())
        if looked:
            signs.after_step(step, batch)
        sampled.add()
        if schedule is not None:
            schedule.step()
        data.advance(batch)
        if step % BLOCK == 0:
            values = blocks.compute()
            blocks.reset()
            aucs.append(_by_task(values, log.schema, "auc"))
            entropies.append(_by_task(values, log.schema, "ne"))
        if eval_every and step % eval_every == 0:
            evaluated.append((step, _evaluated(module, held_out)))
        totals.append(float(loss.total.detach()))
        if last is None and step >= PAST + NEAR and event_begins(totals[-PAST - NEAR :]):
            last = step - NEAR + AFTER
        if last is None and step == 2 * PAST and not aucs[-1][0] > LEARNED:
            last = step
        if step in (cfg.train.max_steps, last):
            break
    evaluated.append((len(signals), _evaluated(module, data.test_dataloader())))
    meta = {
        "format": FORMAT,
        "overrides": list(overrides),
        "data": cfg.data.name,
        "model": cfg.model.name,
        "optim": cfg.optim.name,
        "lr": module.lr,
        "initial_accumulator_value": cfg.optim.get("initial_accumulator_value"),
        "seed": cfg.seed,
        "batch_size": cfg.scale.batch_size,
        "rows": _rows(cfg),
        "warmup_steps": cfg.train.warmup_steps,
        "tasks": list(log.schema.task_names),
        "task_types": [task.type for task in log.schema.tasks],
        "task_weights": [task.weight for task in log.schema.tasks],
        "sign_names": list(signs.names),
        "g_layers": sampled.layers(),
        "commit": provenance.commit(),
    }
    arrays = {
        "signals": torch.stack(signals).numpy(),
        "lr": np.array(rates, dtype=np.float32),
        "signs": _padded(signs.table(), len(signals)),
        "g_log2_change": _smallest(sampled.changes()),
        "block_auc": np.array(aucs, dtype=np.float32).reshape(len(aucs), len(meta["tasks"])),
        "block_ne": np.array(entropies, dtype=np.float32).reshape(len(aucs), len(meta["tasks"])),
        "eval_step": np.array([step for step, _ in evaluated], dtype=np.int32),
        "eval_auc": np.array([_by_task(v, log.schema, "auc") for _, v in evaluated], dtype=np.float32),
        "eval_ne": np.array([_by_task(v, log.schema, "ne") for _, v in evaluated], dtype=np.float32),
    }
    return Recorded(meta=meta, arrays=arrays)


def _rows(cfg: DictConfig) -> str | None:
    """What decides the rows of a generated stream, but the size of its jumps: with 1, no run is hit by one."""
    if cfg.data.name != "synthetic":
        return None
    made = OmegaConf.to_container(cfg.data.log, resolve=True)
    assert isinstance(made, dict)
    made["difficulty"].pop("jump")
    return json.dumps(made, sort_keys=True)


@torch.no_grad()
def _evaluated(module: RankingModule, batches: Any) -> dict[str, float]:
    metrics = TaskMetrics(module.schema)
    module.net.eval()
    for batch in batches:
        metrics.update(module.net(batch), batch.labels_BT, batch.mask_BT)
    module.net.train()
    return metrics.compute()


def _by_task(values: Mapping[str, float], schema: Schema, metric: str) -> list[float]:
    return [values.get(f"{task}/{metric}", np.nan) for task in schema.task_names]


def _padded(table: Array, rows: int) -> Array:
    """With rows of nan at its end."""
    return np.pad(table, ((0, rows - len(table)), (0, 0)), constant_values=np.nan)


def _smallest(table: Array) -> Array:
    """As int16 where all values fit."""
    return table.astype(np.int16) if not table.size or np.abs(table).max() < 2**15 else table
