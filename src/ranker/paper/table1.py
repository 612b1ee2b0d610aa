"""Table 1: parameters of the three models at the paper's widths, and the input width that fits its counts.

    Small   d * 512 + 512 + 512^2 + ...          Large   d * 4096 + 3 * 4096^2 + ...
    Large+DCN   L * (d^2 + d) + 2 d + Large      (L full-rank cross layers, then layer norm)

The paper gives neither d nor L. Models are built on the meta device, where weights have a shape and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from ranker.data.schema import CategoricalFeature, Schema, Task
from ranker.models import SharedBottom
from ranker.paper.jobs import Data, Job, Setting
from ranker.paper.markdown import table
from ranker.paper.study import Found, Phase, Sections, Study

PAPER = {"Small": 7.5e6, "Large": 57.0e6, "Large+DCN": 68.0e6}
HIDDEN = {"Small": (512, 512), "Large": (4096,) * 4, "Large+DCN": (4096,) * 4}  # those of conf/scale/paper.yaml
TASKS = 6
CROSS_LAYERS = (1, 2, 3, 4, 5, 6)
TOLERANCE = 0.05


def parameters(model: str, *, width: int, cross_layers: int = 0) -> int:
    """Non-embedding parameters of a model on an input of ``width`` numbers.

    Args:
        model: a key of ``PAPER``.
        width: dense features and embeddings together.
        cross_layers: of Large+DCN.
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
    """The input width whose parameters are closest to a number."""
    low, high = 1, 2
    while parameters(model, width=high, cross_layers=cross_layers) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if parameters(model, width=middle, cross_layers=cross_layers) < target else (low, middle)
        )
    return min((low, high), key=lambda w: abs(parameters(model, width=w, cross_layers=cross_layers) - target))


def measure(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:  # noqa: ARG001  (no run is needed)
    """Widths that fit, a row each: Small and Large alone, and Large with Large+DCN for each number of cross layers."""
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


def sections(data: Data, found: Found) -> Sections:  # noqa: ARG001  (the same for all data)
    """Parameters beside the paper's at each width."""
    rows = []
    for (fit, width), here in found["table1"].group_by(["fit", "width"], maintain_order=True):
        counts = dict(zip(here["model"], here["parameters"], strict=True))
        cells = [_beside(counts[model], PAPER[model]) if model in counts else "" for model in PAPER]
        rows.append([str(fit), f"{width:,}", *cells])
    header = [f"{model}, paper {number / 1e6:.1f} M" for model, number in PAPER.items()]
    return {"parameters": table(["fitted to", "input width", *header], rows)}


def _beside(count: int, paper: float) -> str:
    off = count / paper - 1
    text = f"{count / 1e6:.2f} M ({100 * off:+.1f} %)"
    return f"**{text}**" if abs(off) <= TOLERANCE else text


STUDY = Study(
    name="table1",
    title="Table 1, non-embedding parameters at the paper's widths (bold: within 5 %)",
    phases=(Phase("table1", lambda setting, found: [], read=measure),),  # noqa: ARG005
    sections=sections,
    needs_data=False,
)
