"""The summary of a run: summary.json, and the table on the console."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from ranker import config
from ranker.errors import UserError
from ranker.runs import lineage, provenance
from ranker.runs.config_identity import cell_hash, config_hash
from ranker.runs.metric_names import COMMON, TEST, task_metric
from ranker.runs.run_folder import read_summary, versions
from ranker.stability import worth
from ranker.stability.optimizer_state import ADAPTED, adaptation

if TYPE_CHECKING:  # a sweep reads summaries of earlier runs without importing Lightning
    import torch

    from ranker.build import Run
    from ranker.stability import DivergenceDetector
    from ranker.training.module import RankingModule

ADAPTED_AFTER = 100  # steps from which on a run is told that Adagrad never adapted
NO_DIVERGENCE = {"micro": 0, "full": False, "unsettled": 0, "first_step": None}


def summarise(
    run: Run, *, status: str, reason: str, seconds: float, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        run: the run.
        status: ``completed``, ``diverged`` or ``failed``.
        reason: why it is not completed, or what is not settled, in one sentence; empty otherwise.
        seconds: wall-clock time of training and evaluation.
        more: what a run that was trained with others adds, or measures in another way.
    """
    optimizers = run.trainer.optimizers
    return summary_of(
        run.cfg,
        module=run.module,
        detector=run.stability.detector,
        optimizer=optimizers[0] if optimizers else None,
        sharpness=run.sharpness.summary() if run.sharpness else None,
        rollbacks=run.stability.rollbacks,
        measured={
            "steps": run.trainer.global_step,
            "examples": run.bookkeeping.examples,
            "bad_rows": run.datamodule.log.num_bad_rows,
            "examples_per_second": round(run.bookkeeping.examples_per_second(), 1),
            "data_wait_fraction": round(run.bookkeeping.data_wait_fraction(), 4),
            "seconds": round(seconds, 1),
            "world_size": run.trainer.world_size,
            **trained_before(run),
            **({} if run.datamodule.order_seed is None else {"order_seed": run.datamodule.order_seed}),
            **(more or {}),
        },
        status=status,
        reason=reason,
    )


def summary_of(
    cfg: DictConfig,
    *,
    module: RankingModule,
    detector: DivergenceDetector | None,
    optimizer: torch.optim.Optimizer | None,
    measured: Mapping[str, Any],
    status: str,
    reason: str,
    sharpness: Mapping[str, Any] | None = None,
    rollbacks: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The content of summary.json, from the parts of a run.

    Args:
        cfg: the configuration.
        module: the model, with the metrics of the hold-out.
        detector: the divergence detector; None without one.
        optimizer: has the accumulators; None before there is one.
        measured: from ``steps`` to ``world_size``, in the order of the file.
        status: as in ``summarise``.
        reason: as in ``summarise``.
        sharpness: the summary of the sharpness probe; None without one.
        rollbacks: records of the rollbacks.
    """
    adapted = _adaptation(module, optimizer)
    return {
        "status": status,
        "reason": reason,
        **asked_for(cfg),
        "data": data_name(cfg, module.schema.name),
        "metrics": module.holdout,
        **_more_metrics(cfg, module),
        "no_better_than_constant": no_better_than_constant(module.holdout),
        "divergence": detector.summary() if detector else dict(NO_DIVERGENCE),
        **({"sharpness": sharpness} if sharpness else {}),
        **({"adapted": adapted} if adapted else {}),
        "rollbacks": [dict(record) for record in rollbacks],
        **measured,
        "parameters": module.net.count_parameters(),  # type: ignore[operator]
        **made_with(cfg),
    }


def _more_metrics(cfg: DictConfig, module: RankingModule) -> dict[str, Any]:
    """Confidence intervals and tables of the metrics, where there are any."""
    found: dict[str, Any] = {}
    if module.holdout_intervals:
        level = OmegaConf.select(cfg, "metrics.intervals.level", default=None)
        found["intervals"] = {"level": level, **{n: list(ends) for n, ends in module.holdout_intervals.items()}}
    if module.holdout_tables:
        found["tables"] = [table.plain() for table in module.holdout_tables]
    return found


def trained_before(run: Run) -> dict[str, Any]:
    """What the run continues, and the time of the last row that it has seen itself."""
    _, _, last_time_ms = run.datamodule.trained()
    known: dict[str, Any] = {"last_row_time": lineage.iso(last_time_ms)}
    if run.warm_start is not None:
        known["warm_start"] = run.warm_start.summary
    elif (parent := lineage.parent(run.cfg)) is not None:  # a resumed run
        earlier = (read_summary(run.folder.path) or {}).get("warm_start", {})
        known["warm_start"] = earlier or parent
    return known


def verdict(detector: DivergenceDetector | None, *, rollbacks: int = 0) -> tuple[str, str]:
    """Status and reason of a run that trained to its end, or until it was lost.

    Args:
        detector: after its final verdict; None without one.
        rollbacks: how many were made.
    """
    if detector is not None and detector.status == "diverged":
        help_ = f"; {rollbacks} rollback{'s' if rollbacks > 1 else ''} before it did not help for good"
        return "diverged", detector.reason + (help_ if rollbacks else "")
    if detector is not None and detector.unsettled:
        return "completed", "unsettled: " + "; ".join(map(str, detector.unsettled))
    return "completed", ""


def never_began(cfg: DictConfig, *, reason: str, seconds: float) -> dict[str, Any]:
    """The summary of a run that failed before it was built, such as a job of a sweep with a wrong value."""
    return {
        "status": "failed",
        "reason": reason,
        **asked_for(cfg),
        "metrics": {},
        "no_better_than_constant": [],
        "divergence": dict(NO_DIVERGENCE),
        "rollbacks": [],
        "steps": 0,
        "examples": 0,
        "bad_rows": 0,
        "examples_per_second": 0.0,
        "data_wait_fraction": 0.0,
        "seconds": round(seconds, 1),
        "world_size": 0,
        "parameters": {"embedding": None, "dense": None},
        **made_with(cfg),
    }


def data_name(cfg: DictConfig, schema: str) -> str:
    """The name of the data by which runs are compared: of one's own logs the schema's, since all are ``parquet``."""
    return schema if cfg.data.name == "parquet" else str(cfg.data.name)


def asked_for(cfg: DictConfig) -> dict[str, Any]:
    """The choices by which runs are compared."""
    try:
        base_lr = config.base_lr(cfg)
    except UserError:  # the reason why a run never began
        base_lr = math.nan
    return {
        "model": cfg.model.name,
        "optim": cfg.optim.name,
        "mitigation": OmegaConf.select(cfg, "mitigation.name", default="none"),  # missing in old runs
        "data": cfg.data.name,
        "scale": cfg.scale.name,
        "lr": base_lr * cfg.lr_mult,
        "base_lr": base_lr,
        "lr_mult": cfg.lr_mult,
        "seed": cfg.seed,
        "batch_size": cfg.scale.batch_size,
    }


def made_with(cfg: DictConfig) -> dict[str, Any]:
    """What is needed to get the same numbers: hash of the configuration, commit, machine, versions."""
    return {
        "config_hash": config_hash(cfg),
        "cell": cell_hash(cfg),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "versions": versions(),
    }


def show(summary: dict[str, Any], console: Console | None = None) -> None:
    """Prints the hold-out's metrics per task, and how the run ended."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a log file has no width
    metrics = summary["metrics"]
    names = [name for name in dict.fromkeys(key.split("/")[2] for key in metrics) if name in COMMON]
    if not any(value for key, value in metrics.items() if key.endswith("/nonfinite")):
        names = [name for name in names if name != "nonfinite"]
    table = Table(title="hold-out, at the end of training", title_justify="left")
    table.add_column("task", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for task in dict.fromkeys(key.split("/")[1] for key in metrics):
        table.add_row(task, *(_cell(name, metrics.get(task_metric(TEST, task, name))) for name in names))
    if names:
        console.print(table)
    if any(key.split("/")[2] not in COMMON for key in metrics):
        console.print(_others(metrics))
    if intervals := dict(summary.get("intervals") or {}):
        level = intervals.pop("level")
        console.print(_intervals(intervals, level), soft_wrap=True, highlight=False)
    verdict = f"{summary['status']}: {summary['reason']}" if summary["reason"] else summary["status"]
    console.print(verdict, soft_wrap=True, style="yellow" if summary["reason"] else "green", highlight=False)
    if warning := never_adapted(summary):
        console.print(warning, soft_wrap=True, style="yellow", highlight=False)
    if useless := no_better_than_constant(metrics):
        console.print(
            f"no better than a constant prediction on the hold-out: {', '.join(useless)} "
            f"(NE >= 1, R2 <= 0 or AUC < {worth.AUC_OF_CHANCE:g})",
            soft_wrap=True,
            style="yellow",
            highlight=False,
        )
    if summary["bad_rows"]:
        console.print(f"{summary['bad_rows']:,} rows could not be used and were left out", style="yellow")
    rate, speed = summary["examples_per_second"], ""
    if rate > 0:  # 0: a resumed run that had nothing left to train
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        speed = f", {shown} examples/s, {100 * summary['data_wait_fraction']:.1f} % waiting for data"
    console.print(
        f"{summary['steps']:,} steps, {summary['examples']:,} examples{speed}",
        soft_wrap=True,
        highlight=False,
    )


def _others(metrics: Mapping[str, float | None]) -> Table:
    """The metrics that ``metrics=`` added, a row each: they are many, and their names are long."""
    tasks = dict.fromkeys(key.split("/")[1] for key in metrics)
    table = Table("metric", *tasks, title_justify="left")
    for name in dict.fromkeys(key.split("/")[2] for key in metrics):
        if name not in COMMON:
            table.add_row(name, *(_cell(name, metrics.get(task_metric(TEST, task, name))) for task in tasks))
    return table


def _intervals(intervals: Mapping[str, Sequence[float]], level: float) -> str:
    """The intervals of the first metric of each task; summary.json and the report page have those of all metrics."""
    first: dict[str, str] = {}
    for key, (low, high) in intervals.items():
        _, task, name = key.split("/")
        first.setdefault(task, f"{task} {name} {low:.4f} to {high:.4f}")
    return f"{100 * level:g} % confidence intervals: {', '.join(first.values())}; summary.json has all"


def never_adapted(summary: dict[str, Any]) -> str:
    """A warning where Adagrad has not adapted the median coordinate of the shared layers; empty otherwise.

    There is none below ``ADAPTED_AFTER`` steps, because a short run says nothing about G_0.
    """
    adapted = summary.get("adapted")
    if not adapted or adapted["share"] >= 0.5 or summary["steps"] < ADAPTED_AFTER:
        return ""
    start = adapted["initial_accumulator_value"]
    lower = min(1e-6, start / 100)
    return (
        f"Adagrad never adapted: the median accumulator of the shared layers is still at its start {start:g} "
        f"({100 * adapted['share']:.3g} % of the coordinates are above {ADAPTED * start:g}); "
        f"try optim.initial_accumulator_value={lower:g} with a lower lr_mult"
    )


def no_better_than_constant(metrics: Mapping[str, float | None]) -> list[str]:
    """Names of the tasks of which ``worth.no_better_than_constant`` says so.

    Args:
        metrics: those of the hold-out, by ``test/<task>/<metric>``.
    """
    return worth.no_better_than_constant({key.removeprefix(f"{TEST}/"): value for key, value in metrics.items()})


def _adaptation(module: RankingModule, optimizer: torch.optim.Optimizer | None) -> dict[str, float] | None:
    """How many coordinates of the layers that all tasks share have adapted; None without Adagrad's accumulators."""
    shared = [p for name, p in module.net.named_parameters() if not name.startswith(("embeddings.", "heads."))]
    found = None if optimizer is None else adaptation(optimizer, shared)
    return {"share": float(found.share), "initial_accumulator_value": found.start} if found else None


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "undefined"
    return f"{value:,.0f}" if name in ("observed", "nonfinite") else f"{value:.4f}"
