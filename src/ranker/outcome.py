"""How a run ended: summary.json, and the table a person reads."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from ranker.build import Run
from ranker.config import base_lr
from ranker.training.run_folder import versions


def summarise(run: Run, *, status: str, reason: str, seconds: float) -> dict[str, Any]:
    """What summary.json says.

    Args:
        run: the run.
        status: ``completed``, ``diverged`` or ``failed``.
        reason: why it is not completed, in plain words; empty where it is.
        seconds: wall-clock time of training and evaluation.
    """
    cfg = run.cfg
    lost = (
        run.watch.detector.summary()
        if run.watch and run.watch.detector
        else {"micro": 0, "full": False, "first_step": None}
    )
    return {
        "status": status,
        "reason": reason,
        "model": cfg.model.name,
        "optim": cfg.optim.name,
        "data": cfg.data.name,
        "scale": cfg.scale.name,
        "lr": base_lr(cfg) * cfg.lr_mult,
        "base_lr": base_lr(cfg),
        "lr_mult": cfg.lr_mult,
        "seed": cfg.seed,
        "batch_size": cfg.scale.batch_size,
        "metrics": run.module.holdout,
        "divergence": lost,
        "steps": run.trainer.global_step,
        "examples": run.throughput.examples,
        "bad_rows": getattr(run.datamodule.log, "num_bad_rows", 0),  # only logs from files can hold any
        "examples_per_second": round(run.throughput.examples_per_second, 1),
        "data_wait_fraction": round(run.throughput.data_wait_fraction, 4),
        "seconds": round(seconds, 1),
        "world_size": run.trainer.world_size,
        "parameters": run.module.net.count_parameters(),  # type: ignore[operator]
        "versions": versions(),
    }


def show(summary: dict[str, Any], console: Console | None = None) -> None:
    """Prints the hold-out's metrics by task, and how the run ended."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a log file has no edge that the table must not cross
    metrics = summary["metrics"]
    names = list(dict.fromkeys(key.split("/")[2] for key in metrics))
    if not any(value for key, value in metrics.items() if key.endswith("/nonfinite")):
        names = [name for name in names if name != "nonfinite"]
    table = Table(title="hold-out, at the end of training", title_justify="left")
    table.add_column("task", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for task in dict.fromkeys(key.split("/")[1] for key in metrics):
        table.add_row(task, *(_cell(name, metrics.get(f"test/{task}/{name}")) for name in names))
    if names:
        console.print(table)
    verdict = f"{summary['status']}: {summary['reason']}" if summary["reason"] else summary["status"]
    console.print(verdict, soft_wrap=True, style="yellow" if summary["reason"] else "green", highlight=False)
    if summary["bad_rows"]:
        console.print(f"{summary['bad_rows']:,} rows could not be used and were left out", style="yellow")
    console.print(
        f"{summary['steps']:,} steps, {summary['examples']:,} examples, "
        f"{summary['examples_per_second']:,.0f} examples/s, "
        f"{100 * summary['data_wait_fraction']:.1f} % waiting for data",
        soft_wrap=True,
        highlight=False,
    )


def objective(summary: dict[str, Any], name: str | None) -> float:
    """The number a sweep maximises; 0 where it is undefined, as it may be for a lost model."""
    metrics = summary["metrics"]
    chosen = name or next((key for key in metrics if key.endswith("/auc")), None)
    value = metrics.get(chosen, math.nan) if chosen else math.nan
    return value if math.isfinite(value) else 0.0


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "undefined"
    return f"{value:,.0f}" if name in ("observed", "nonfinite") else f"{value:.4f}"
