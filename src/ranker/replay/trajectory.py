"""The result of a replay: signals per batch and the first divergence; comparisons, a plot and a table of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from ranker.data.schema import Schema
from ranker.stability import Event
from ranker.stability.detector_interface import num_tasks, unpack

_RUN_COLOUR = "#c0392b"
_COLOURS = ("#1a5276", "#d68910", "#6c3483", "#117a65", "#7d6608", "#2e4053")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Training on a sequence of batches.

    Attributes:
        name: label in plots and tables.
        steps: step that each batch belongs to.
        signals_SN: float32 [S, N], in the order of ``ranker.stability.pack``.
        event: first divergence that the detector found in it, with a verdict or still open at the end.
    """

    name: str
    steps: Sequence[int]
    signals_SN: Tensor
    event: Event | None

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return num_tasks(self.signals_SN.shape[1])

    @property
    def losses_ST(self) -> Tensor:  # noqa: N802
        """Unweighted loss per task."""
        return unpack(self.signals_SN)["losses_T"]

    @property
    def auc_ST(self) -> Tensor:  # noqa: N802
        """Training AUC per task; nan for regressions."""
        return unpack(self.signals_SN)["auc_T"]  # type: ignore[return-value]

    def total_loss_S(self, schema: Schema) -> Tensor:  # noqa: N802
        """Sum over tasks of weight times loss, per batch; float64."""
        weight_T = torch.tensor([task.weight for task in schema.tasks], dtype=torch.float64)
        return (self.losses_ST.double() * weight_T).sum(1)

    def __str__(self) -> str:
        """The outcome in a few words."""
        event = self.event
        if event is None:
            return "healthy"
        depth = f"{event.depth:.3g}x" if math.isfinite(event.depth) else "not finite"
        back = (
            f"came back at step {event.recovered_at}" if event.recovered_at is not None else "was not back at the end"
        )
        return f"moved at step {event.step}" + (f" ({depth}), {back}" if event.depth != 1.0 else f", {back}")


def first_difference(recorded_ST: Tensor, replayed_ST: Tensor) -> int | None:
    """Index of the first batch whose losses are not bit-equal; None where all are. nan equals nan."""
    both_nan = recorded_ST.isnan() & replayed_ST.isnan()
    same_ST = (recorded_ST.view(torch.int32) == replayed_ST.view(torch.int32)) | both_nan
    different = (~same_ST.all(dim=1)).nonzero()
    return int(different[0]) if len(different) else None


def largest_difference(recorded_ST: Tensor, replayed_ST: Tensor) -> float:
    """Largest |a - b| / max(|a|, |b|) over losses that are finite in both; infinite where only one of them is."""
    finite = recorded_ST.isfinite(), replayed_ST.isfinite()
    if not torch.equal(*finite):
        return math.inf
    a, b = recorded_ST[finite[0]].double(), replayed_ST[finite[0]].double()
    if not len(a):
        return 0.0
    return float(((a - b).abs() / torch.maximum(a.abs(), b.abs()).clamp(min=1e-30)).max())


def plot_replays(
    trajectories: Sequence[Trajectory], schema: Schema, event: Event, destination: Path, *, title: str
) -> None:
    """Plots the training loss, and below it the training AUC of the first binary task, over steps.

    Args:
        trajectories: the run, followed by its alternatives.
        schema: names and weights of the tasks.
        event: the divergence; a vertical line marks its first step.
        destination: the file; its extension determines the format (.png, .svg).
        title: title of the figure.
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
        losses_S = trajectory.total_loss_S(schema)
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


def table_of_replays(trajectories: Sequence[Trajectory], schema: Schema, event: Event, *, max_rows: int = 16) -> Table:
    """The total loss at some steps and at the first step of the divergence, with one column per trajectory."""
    table = Table(title="training loss, sum of tasks", title_justify="left")
    table.add_column("step", justify="right")
    for trajectory in trajectories:
        table.add_column(trajectory.name, justify="right")
    losses = [dict(zip(t.steps, t.total_loss_S(schema).tolist(), strict=True)) for t in trajectories]
    steps = sorted({step for by_step in losses for step in by_step})
    every = math.ceil(len(steps) / max_rows)
    for index, step in enumerate(steps):
        if index % every and step != event.step:
            continue
        cells = [f"{by_step[step]:.4g}" if step in by_step else "" for by_step in losses]
        table.add_row(f"{step}", *cells, style="yellow" if step == event.step else None)
    return table
