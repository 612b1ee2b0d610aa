"""A figure of training loss and hold-out AUC of several runs, and the colours of the optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from ranker.errors import UserError
from ranker.runs.metric_names import TRAIN_LOSS, VAL, task_metric
from ranker.runs.run_folder import METRICS, whole_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"adagrad": "#c0392b", "gc": "#d68910", "agc": "#7d6608", "lamb": "#6c3483", "clippy": "#1a5276"}


def plot_training(runs: Sequence[tuple[str, str, Path]], task: str, destination: Path, *, title: str) -> None:
    """Draws the training loss (above) and the hold-out AUC of one task (below) over steps.

    Args:
        runs: (label, optimizer name, run folder) of each curve.
        task: a binary task.
        destination: the figure file; its suffix decides the format (.png, .svg).
        title: of the figure.

    Raises:
        UserError: a run has no metrics.csv, or no AUC of the task.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(7.5, 6), height_ratios=[1, 1])
    for label, optim, folder in runs:
        metrics = _read(folder)
        _line(upper, metrics, TRAIN_LOSS, label, optim)
        _line(lower, metrics, task_metric(VAL, task, "auc"), label, optim, marker="o")
    upper.set_yscale("log")
    upper.set_ylabel("training loss, sum of tasks")
    upper.set_title(title, loc="left")
    lower.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    lower.annotate(
        "no better than chance",
        (1.0, 0.5),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="grey",
        fontsize=8,
    )
    lower.set_ylabel(f"{task} AUC on the hold-out")
    lower.set_xlabel("step")
    upper.legend(frameon=False)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(destination, dpi=150)
    pyplot.close(figure)


def _read(folder: Path) -> pl.DataFrame:
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"no {METRICS} in {folder}; a run with logger=none writes none")
    return pl.read_csv(whole_lines(path), infer_schema_length=None)


def _line(axes: Axes, metrics: pl.DataFrame, column: str, label: str, optim: str, *, marker: str = "") -> None:
    if column not in metrics.columns:
        raise UserError(f"no column '{column}' in metrics.csv; known: {', '.join(metrics.columns)}")
    points = metrics.select("step", pl.col(column).cast(pl.Float64)).drop_nulls()
    axes.plot(
        points["step"],
        points[column],
        label=label,
        color=COLOURS.get(optim),
        marker=marker,
        markersize=3,
        linewidth=1.3,
    )
