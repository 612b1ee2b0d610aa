"""Table 2: three models by five methods, each with its best threshold and learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import polars as pl

from ranker.paper import table2_sections
from ranker.paper.jobs import BARE, METHODS, MORE_MODELS, PAPER_MODELS, THRESHOLDS, Grids, Job, Setting, grid
from ranker.paper.study import Found, Phase, Study

RATES = (1, 2)


class Choice(NamedTuple):
    """What the validation day chose for one model and method.

    Attributes:
        lr_mult: the better learning rate.
        thresholds: the best threshold at each learning rate; None for a method without one.
    """

    lr_mult: int
    thresholds: Mapping[int, float | None]


def search_jobs(
    setting: Setting,
    *,
    models: Sequence[str] = PAPER_MODELS,
    methods: Sequence[str] = METHODS,
    grids: Grids = THRESHOLDS,
) -> list[Job]:
    """Phase 1: thresholds and learning rates, evaluated on the validation day."""
    jobs = []
    for model in models[:1] if setting.quick else models:
        for method in methods:
            axes: dict[str, Sequence[object]] = {"model": (model,), "optim": (method,), "lr_mult": RATES}
            if method in grids:
                key, values = grids[method]
                axes[key] = values[:2] if setting.quick else values
            jobs += grid((*setting.common, *BARE, *setting.data.validation), {**axes, "seed": (0,)})
    return jobs


def choose(search: pl.DataFrame, metric: str, *, grids: Grids = THRESHOLDS) -> dict[tuple[str, str], Choice]:
    """Best threshold at each learning rate, and the better rate, by one metric on the validation day.

    A run that did not complete is never chosen over one that did; where none completed, the first of the grid is.

    Args:
        search: runs of phase 1, one a cell.
        metric: larger is better, such as ``is_click/auc``.
        grids: key and values of what was searched, by method.
    """
    usable = pl.when(pl.col("status") == "completed").then(pl.col(metric)).fill_nan(None).fill_null(-1.0)
    ranked = search.sort(usable, descending=True, maintain_order=True)
    chosen: dict[tuple[str, str], Choice] = {}
    for (model, method), runs in ranked.group_by(["model", "optim"], maintain_order=True):
        key = grids[str(method)][0] if str(method) in grids else None
        thresholds: dict[int, float | None] = {}
        for run in runs.iter_rows(named=True):
            thresholds.setdefault(int(run["lr_mult"]), run[key] if key else None)
        chosen[str(model), str(method)] = Choice(int(runs["lr_mult"][0]), thresholds)
    return chosen


def final_jobs(setting: Setting, chosen: Mapping[tuple[str, str], Choice], *, grids: Grids = THRESHOLDS) -> list[Job]:
    """Phase 2: the whole training log and the test day, several seeds, at both learning rates."""
    jobs = []
    for (model, method), choice in sorted(chosen.items()):
        for rate in RATES:
            axes: dict[str, Sequence[object]] = {"model": (model,), "optim": (method,), "lr_mult": (rate,)}
            if method in grids:
                axes[grids[method][0]] = (choice.thresholds[rate],)
            jobs += grid((*setting.common, *BARE), {**axes, "seed": tuple(range(setting.seeds))})
    return jobs


def _study(name: str, title: str, models: Sequence[str]) -> Study:
    search, final = f"{name}_search", f"{name}_final"
    return Study(
        name=name,
        title=title,
        phases=(
            Phase(search, lambda setting, _: search_jobs(setting, models=models)),
            Phase(final, lambda setting, found: final_jobs(setting, choose(found[search], f"{setting.data.auc}/auc"))),
        ),
        sections=lambda data, found: table2_sections.sections(
            data, found[final], choose(found[search], f"{data.auc}/auc"), models
        ),
    )


STUDY = _study("table2", "Table 2, five methods on the paper's three models", PAPER_MODELS)
MORE = _study(
    "table2_soft", "As table 2, on softly shared bottoms (MMoE and PLE), which the paper's table has not", MORE_MODELS
)


def choices(setting: Setting, found: Found) -> dict[tuple[str, str], Choice]:
    """What table 2's validation day chose, for studies that start from it."""
    return choose(found["table2_search"], f"{setting.data.auc}/auc")
