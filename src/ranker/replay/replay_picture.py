"""A divergence and other ways it could have gone: one picture and one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from ranker.data.schema import Schema
from ranker.replay.trajectory import Trajectory
from ranker.stability import Event

_RUN_COLOUR = "#c0392b"
_COLOURS = ("#1a5276", "#d68910", "#6c3483", "#117a65", "#7d6608", "#2e4053")


def total_loss(trajectory: Trajectory, schema: Schema) -> Tensor:
    """Sum over tasks of weight times loss, by batch; float64 [S]."""
    weight_T = torch.tensor([task.weight for task in schema.tasks], dtype=torch.float64)
    return (trajectory.losses_ST.double() * weight_T).sum(1)


def plot_replays(
    trajectories: Sequence[Trajectory], schema: Schema, event: Event, destination: Path, *, title: str
) -> None:
    """Draws the training loss above, and the training AUC of the first binary task below, over steps.

    Args:
        trajectories: the run first, then its alternatives.
        schema: names and weights of the tasks.
        event: the divergence, marked by a line at its first step.
        destination: the picture; its ending chooses the format (.png, .svg).
        title: what is compared.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    binary = next((i for i, task in enumerate(schema.tasks) if task.type == "binary"), None)
    figure, panels = pyplot.subplots(1 if binary is None else 2, 1, sharex=True, squeeze=False, figsize=(8, 6))
    upper, lower = panels[0, 0], panels[-1, 0]
    for number, trajectory in enumerate(trajectories):
        colour = _COLOURS[(number - 1) % len(_COLOURS)] if number else _RUN_COLOUR
        style = {"color": colour, "linewidth": 1.5, "label": f"{trajectory.name}: {trajectory}"}
        losses_S = total_loss(trajectory, schema)
        upper.plot(trajectory.steps, torch.where(losses_S.isfinite(), losses_S, torch.nan).tolist(), **style)
        if binary is not None:
            lower.plot(trajectory.steps, trajectory.auc_ST[:, binary].tolist(), **style)
    for panel in {upper, lower}:
        panel.axvline(event.step, color="grey", linewidth=0.8, linestyle=":")
        panel.spines[["top", "right"]].set_visible(False)
    upper.set_yscale("log")
    upper.set_ylabel("training loss, sum of tasks")
    upper.set_title(title, loc="left")
    upper.legend(frameon=False, fontsize=8)
    if binary is not None:
        lower.set_ylabel(f"{schema.tasks[binary].name} AUC, training")
    lower.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(destination, dpi=150)
    pyplot.close(figure)


def table_of_replays(trajectories: Sequence[Trajectory], schema: Schema, event: Event, *, most: int = 16) -> Table:
    """The total loss at some steps, the divergence's first among them: a row a step, a column a trajectory."""
    table = Table(title="training loss, sum of tasks", title_justify="left")
    table.add_column("step", justify="right")
    for trajectory in trajectories:
        table.add_column(trajectory.name, justify="right")
    losses = [dict(zip(t.steps, total_loss(t, schema).tolist(), strict=True)) for t in trajectories]
    steps = sorted({step for found in losses for step in found})
    every = math.ceil(len(steps) / most)
    for place, step in enumerate(steps):
        if place % every and step != event.step:
            continue
        cells = [f"{found[step]:.4g}" if step in found else "" for found in losses]
        table.add_row(f"{step}", *cells, style="yellow" if step == event.step else None)
    return table
