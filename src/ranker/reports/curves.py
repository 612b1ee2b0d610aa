"""A figure of training loss and hold-out AUC of several runs, and the colours of the optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from ranker.errors import UserError
from ranker.runs.metric_names import TRAIN_LOSS, VAL, task_metric
from ranker.runs.run_folder import METRICS, whole_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"adagrad": "#c0392b", "gc": "#d68910", "agc": "#7d6608", "lamb": "#6c3483", "clippy": "#1a5276"}


OTHERS = ("#117a65", "#b9770e", "#5d6d7e", "#a04000", "#1f618d", "#7b241c")  # of optimizers without one of their own
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """A run in a figure.

    Attributes:
        label: its words in the legend.
        optim: its optimizer, which decides the colour.
        lr_mult: its learning rate, which decides the dashes.
        folder: the run folder.
    """

    label: str
    optim: str
    lr_mult: float
    folder: Path


def styles(runs: Sequence[Curve]) -> list[tuple[str, str]]:
    """Colour and dashes of each curve: one colour a method, one kind of line a learning rate."""
    others = sorted({run.optim for run in runs} - COLOURS.keys())
    colours = COLOURS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    rates = sorted({run.lr_mult for run in runs})
    return [(colours[run.optim], DASHES[rates.index(run.lr_mult) % len(DASHES)]) for run in runs]


def plot_training(runs: Sequence[Curve], task: str, destination: Path, *, title: str) -> None:
    """Draws the training loss (above) and the hold-out AUC of one task (below) over steps.

    Args:
        runs: the runs.
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
    for run, style in zip(runs, styles(runs), strict=True):
        metrics = _read(run.folder)
        _line(upper, metrics, TRAIN_LOSS, run.label, style)
        _line(lower, metrics, task_metric(VAL, task, "auc"), run.label, style, marker="o")
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


def _line(
    axes: Axes, metrics: pl.DataFrame, column: str, label: str, style: tuple[str, str], *, marker: str = ""
) -> None:
    if column not in metrics.columns:
        raise UserError(f"no column '{column}' in metrics.csv; known: {', '.join(metrics.columns)}")
    points = metrics.select("step", pl.col(column).cast(pl.Float64)).drop_nulls()
    axes.plot(
        points["step"],
        points[column],
        label=label,
        color=style[0],
        linestyle=style[1],
        marker=marker,
        markersize=3,
        linewidth=1.3,
    )
