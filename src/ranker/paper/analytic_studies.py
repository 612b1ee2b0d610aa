"""Studies that need no training run: table 1 (parameter counts) and figure 3 (gradient descent on a quadratic)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from ranker.data.schema import CategoricalFeature, Schema, Task
from ranker.models import SharedBottom
from ranker.paper.jobs import Data, Job, Setting
from ranker.paper.rendering import figure, save
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown

# Table 1. The paper gives the parameter counts, but neither the input width nor the number of cross layers.
PAPER = {"Small": 7.5e6, "Large": 57.0e6, "Large+DCN": 68.0e6}
HIDDEN = {"Small": (512, 512), "Large": (4096,) * 4, "Large+DCN": (4096,) * 4}  # those of conf/scale/paper.yaml
TASKS = 6
CROSS_LAYERS = (1, 2, 3, 4, 5, 6)
TOLERANCE = 0.05

# Figure 3: gradient descent on f(w) = sum(e_i w_i^2) / 2 is stable while lr < 2 / max(e), here 0.1.
EIGENVALUES = (20.0, 1.0)
RATES = (0.09, 0.11)
START = (1.0, 1.0)
STEPS = 40
COLOURS = ("#1a5276", "#c0392b")  # by rate


def parameters(model: str, *, width: int, cross_layers: int = 0) -> int:
    """Non-embedding parameters of a model, counted on the meta device, which allocates no memory.

        Small, Large   d h + h + (layers - 1) (h^2 + h) + tasks (h + 1)
        Large+DCN      L (d^2 + d) + 2 d + Large      (L full-rank cross layers, then layer norm)

    Args:
        model: a key of ``PAPER``.
        width: the input width d, dense features and embeddings together.
        cross_layers: L, for Large+DCN only.
    """
    schema = Schema(
        name="width",
        time_column="time_ms",
        categorical=(CategoricalFeature(name="x", num_embeddings=1, embedding_dim=width),),  # its table is not counted
        tasks=tuple(Task(name=f"task{t}") for t in range(TASKS)),
    )
    with torch.device("meta"):
        net = SharedBottom(schema, hidden=HIDDEN[model], cross_layers=cross_layers)
    return net.count_parameters()["dense"]


def fitting_width(target: float, model: str, *, cross_layers: int = 0) -> int:
    """The input width with the parameter count closest to a target, by bisection."""
    low, high = 1, 2
    while parameters(model, width=high, cross_layers=cross_layers) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        small = parameters(model, width=middle, cross_layers=cross_layers) < target
        low, high = (middle, high) if small else (low, middle)
    return min((low, high), key=lambda w: abs(parameters(model, width=w, cross_layers=cross_layers) - target))


def measure_widths(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:  # noqa: ARG001
    """Fitting widths, one row each: Small and Large alone, then all models for each number of cross layers."""
    rows: list[dict[str, Any]] = []
    for model in ("Small", "Large"):
        width = fitting_width(PAPER[model], model)
        rows.append({"fit": f"{model} alone", "width": width, "model": model, "cross_layers": 0})
    for layers in CROSS_LAYERS:
        width = fitting_width(PAPER["Large+DCN"], "Large+DCN", cross_layers=layers)
        for model in PAPER:
            row: dict[str, Any] = {"fit": f"Large+DCN, {layers} cross layers", "width": width, "model": model}
            rows.append(row | {"cross_layers": layers if model == "Large+DCN" else 0})
    for row in rows:
        row["parameters"] = parameters(row["model"], width=row["width"], cross_layers=row["cross_layers"])
    return pl.DataFrame(rows), []


def width_sections(data: Data, found: Found) -> Sections:  # noqa: ARG001
    """Parameter counts at each width, next to the paper's."""
    rows = []
    for (fit, width), here in found["table1"].group_by(["fit", "width"], maintain_order=True):
        counts = dict(zip(here["model"], here["parameters"], strict=True))
        cells = [_beside(counts[model], PAPER[model]) if model in counts else "" for model in PAPER]
        rows.append([str(fit), f"{width:,}", *cells])
    header = [f"{model}, paper {number / 1e6:.1f} M" for model, number in PAPER.items()]
    return {"parameters": as_markdown(["fitted to", "input width", *header], rows)}


def _beside(count: int, paper: float) -> str:
    off = count / paper - 1
    text = f"{count / 1e6:.2f} M ({100 * off:+.1f} %)"
    return f"**{text}**" if abs(off) <= TOLERANCE else text


def descend(lr: float, *, steps: int = STEPS) -> list[tuple[float, float]]:
    """The points of gradient descent from ``START``, which is included: w_i <- (1 - lr e_i) w_i."""
    points = [START]
    for _ in range(steps):
        x, y = points[-1]
        points.append(((1 - lr * EIGENVALUES[0]) * x, (1 - lr * EIGENVALUES[1]) * y))
    return points


def measure_descent(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:  # noqa: ARG001
    """One row per step and rate: x, y, loss."""
    rows = [
        {"lr": lr, "step": step, "x": x, "y": y, "loss": (EIGENVALUES[0] * x * x + EIGENVALUES[1] * y * y) / 2}
        for lr in RATES
        for step, (x, y) in enumerate(descend(lr))
    ]
    return pl.DataFrame(rows), []


def descent_sections(data: Data, found: Found) -> Sections:  # noqa: ARG001
    """The loss after some steps."""
    steps = (0, 10, 20, STEPS)
    rows = []
    for lr in RATES:
        run = found["fig3"].filter(pl.col("lr") == lr)
        rows.append([f"{lr:g}", *(f"{run.filter(pl.col('step') == s)['loss'][0]:.3g}" for s in steps)])
    return {"loss": as_markdown(["lr (the edge is 2 / 20 = 0.1)", *(f"loss at step {s}" for s in steps)], rows)}


def draw_descent(data: Data, found: Found, destination: Path) -> None:  # noqa: ARG001
    """The two paths over the contours of the quadratic, and the loss."""
    import numpy as np

    picture, (left, middle, right) = figure(columns=3, width=11, height=3.6)
    for axes, lr, colour in zip((left, middle), RATES, COLOURS, strict=True):
        run = found["fig3"].filter((pl.col("lr") == lr) & (pl.col("step") <= 12))
        reach = 1.15 * float(run["x"].abs().max())  # type: ignore[arg-type]
        x, y = np.meshgrid(np.linspace(-reach, reach, 120), np.linspace(-0.2, 1.2, 120))
        height = (EIGENVALUES[0] * x**2 + EIGENVALUES[1] * y**2) / 2
        axes.contour(x, y, height, levels=12, colors="#cccccc", linewidths=0.7)
        axes.plot(run["x"], run["y"], marker="o", markersize=3, linewidth=1.2, color=colour)
        axes.set_title(f"lr {lr:g}: {'converges' if lr < 0.1 else 'diverges'}", loc="left", fontsize=10)
        axes.set_xlabel("x, eigenvalue 20")
    left.set_ylabel("y, eigenvalue 1")
    for lr, colour in zip(RATES, COLOURS, strict=True):
        run = found["fig3"].filter(pl.col("lr") == lr)
        right.plot(run["step"], run["loss"], label=f"lr {lr:g}", color=colour)
    right.set_yscale("log")
    right.set_xlabel("step")
    right.set_title("loss", loc="left", fontsize=10)
    right.legend(frameon=False)
    save(picture, destination)


TABLE1 = Study(
    name="table1",
    title="Table 1, non-embedding parameters at the paper's widths (bold: within 5 %)",
    phases=(Phase("table1", lambda *_: [], read=measure_widths),),
    sections=width_sections,
    needs_data=False,
)
FIG3 = Study(
    name="fig3",
    title="Figure 3, a quadratic on both sides of its edge of stability",
    phases=(Phase("fig3", lambda *_: [], read=measure_descent),),
    sections=descent_sections,
    draw=draw_descent,
    needs_data=False,
)
