"""How far the learning rate goes: multiples of 1x for every model and method, and the largest at which none is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from ranker.paper.jobs import BARE, METHODS, THRESHOLDS, Data, Job, Setting, grid
from ranker.paper.markdown import cell, table
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.paper.table2 import Choice, choices
from ranker.paper.table2_sections import LABELS

ABOVE = (4, 8, 16)  # beside the 1x and 2x of table 2
BELOW = (0.5, 0.25, 0.125, 0.0625)  # for naive Adagrad, which is lost at 1x


def jobs(setting: Setting, chosen: Mapping[tuple[str, str], Choice]) -> list[Job]:
    """Naive Adagrad downwards, the others upwards, with the threshold that was best at 2x."""
    jobs = []
    for (model, method), choice in sorted(chosen.items()):
        multiples: tuple[float, ...] = BELOW if method == "adagrad" else ABOVE
        if setting.quick:
            multiples = multiples[:2]
        axes: dict[str, Sequence[object]] = {"model": (model,), "optim": (method,)}
        if method in THRESHOLDS:
            axes[THRESHOLDS[method][0]] = (choice.thresholds[2],)
        axes |= {"lr_mult": multiples, "seed": tuple(range(setting.seeds))}
        jobs += grid((*setting.common, *BARE), axes)
    return jobs


def largest_stable(runs: pl.DataFrame) -> float | None:
    """The largest multiple at which no seed was lost, and at no smaller one that was tried; None where there is none.

    Args:
        runs: of one model and method.
    """
    largest = None
    for (multiple,), tried in runs.sort("lr_mult").group_by("lr_mult", maintain_order=True):
        if (tried["status"] != "completed").any():
            break
        largest = float(multiple)
    return largest


def sections(data: Data, found: Found) -> Sections:
    """The largest stable multiple of each cell, and the AUC at every multiple."""
    runs = pl.concat([found["table2_final"], found["rates"]], how="diagonal_relaxed")
    models = [model for model in LABELS if model in runs["model"].unique()]
    stable, grid_rows = [], []
    for model in models:
        here = runs.filter(pl.col("model") == model)
        line = [LABELS[model]]
        for method in METHODS:
            mine = here.filter(pl.col("optim") == method)
            largest = largest_stable(mine)
            beyond = largest is not None and largest == mine["lr_mult"].max()
            line.append(
                f"below {min(mine['lr_mult'].to_list()):g}x"
                if largest is None
                else f"{largest:g}x" + (" or more" if beyond else "")
            )
        stable.append(line)
        for multiple in sorted(here["lr_mult"].unique()):
            at = here.filter(pl.col("lr_mult") == multiple)
            cells = []
            for method in METHODS:
                mine = at.filter(pl.col("optim") == method)
                cells.append("" if mine.is_empty() else f"{cell(mine, f'{data.auc}/auc')} (n={mine.height})")
            grid_rows.append([LABELS[model], f"{multiple:g}x", *cells])
    return {
        "largest-stable": table(["largest stable lr", *METHODS], stable),
        "auc": table([f"{data.auc} AUC", "lr", *METHODS], grid_rows),
    }


STUDY = Study(
    name="rates",
    title="Learning rates up to 16x",
    phases=(Phase("rates", lambda setting, found: jobs(setting, choices(setting, found))),),
    sections=sections,
    needs=("table2",),
)
