"""Figure 3: gradient descent on a quadratic is stable while lr < 2 / (largest eigenvalue).

f(x, y) = (20 x^2 + y^2) / 2,   w <- w - lr * (20 x, y):   x shrinks by 1 - 20 lr a step, so the edge is lr = 0.1
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ranker.paper.jobs import Data, Job, Setting
from ranker.paper.markdown import table
from ranker.paper.study import Found, Phase, Sections, Study

EIGENVALUES = (20.0, 1.0)
RATES = (0.09, 0.11)
START = (1.0, 1.0)
STEPS = 40


def descend(lr: float, *, steps: int = STEPS) -> list[tuple[float, float]]:
    """The points of gradient descent, the start included."""
    points = [START]
    for _ in range(steps):
        points.append(tuple((1 - lr * e) * w for e, w in zip(EIGENVALUES, points[-1], strict=True)))  # type: ignore[arg-type]
    return points


def loss(point: tuple[float, float]) -> float:
    """The value of the quadratic."""
    return sum(e * w * w for e, w in zip(EIGENVALUES, point, strict=True)) / 2


def measure(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:  # noqa: ARG001  (no run is needed)
    """One row a step and rate: x, y, loss."""
    rows = [
        {"lr": lr, "step": step, "x": point[0], "y": point[1], "loss": loss(point)}
        for lr in RATES
        for step, point in enumerate(descend(lr))
    ]
    return pl.DataFrame(rows), []


def sections(data: Data, found: Found) -> Sections:  # noqa: ARG001  (the same for all data)
    """Loss after some steps."""
    steps = (0, 10, 20, STEPS)
    rows = []
    for lr in RATES:
        run = found["fig3"].filter(pl.col("lr") == lr)
        rows.append([f"{lr:g}", *(f"{run.filter(pl.col('step') == s)['loss'][0]:.3g}" for s in steps)])
    return {"loss": table(["lr (the edge is 2 / 20 = 0.1)", *(f"loss at step {s}" for s in steps)], rows)}


def draw(data: Data, found: Found, destination: Path) -> None:  # noqa: ARG001  (the same for all data)
    """The two paths over the contours of the quadratic, and the loss."""
    import numpy as np

    from ranker.paper.pictures import figure, save

    picture, (left, middle, right) = figure(columns=3, width=11, height=3.6)
    for axes, lr in ((left, RATES[0]), (middle, RATES[1])):
        run = found["fig3"].filter((pl.col("lr") == lr) & (pl.col("step") <= 12))
        reach = 1.15 * float(run["x"].abs().max())  # type: ignore[arg-type]
        x, y = np.meshgrid(np.linspace(-reach, reach, 120), np.linspace(-0.2, 1.2, 120))
        axes.contour(
            x, y, (EIGENVALUES[0] * x**2 + EIGENVALUES[1] * y**2) / 2, levels=12, colors="#cccccc", linewidths=0.7
        )
        axes.plot(
            run["x"], run["y"], marker="o", markersize=3, linewidth=1.2, color="#1a5276" if lr < 0.1 else "#c0392b"
        )
        axes.set_title(f"lr {lr:g}: {'converges' if lr < 0.1 else 'diverges'}", loc="left", fontsize=10)
        axes.set_xlabel("x, eigenvalue 20")
    left.set_ylabel("y, eigenvalue 1")
    for lr, colour in zip(RATES, ("#1a5276", "#c0392b"), strict=True):
        run = found["fig3"].filter(pl.col("lr") == lr)
        right.plot(run["step"], run["loss"], label=f"lr {lr:g}", color=colour)
    right.set_yscale("log")
    right.set_xlabel("step")
    right.set_title("loss", loc="left", fontsize=10)
    right.legend(frameon=False)
    save(picture, destination)


STUDY = Study(
    name="fig3",
    title="Figure 3, a quadratic on both sides of its edge of stability",
    phases=(Phase("fig3", lambda setting, found: [], read=measure),),  # noqa: ARG005
    sections=sections,
    draw=draw,
    needs_data=False,
)
