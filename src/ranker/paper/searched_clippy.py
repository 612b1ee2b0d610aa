"""Table 2 with Clippy's lambda_abs searched as the other methods' thresholds are; the paper keeps its own 0.01."""

from __future__ import annotations

import polars as pl

from ranker.paper.jobs import METHODS, PAPER_MODELS, Data, Grids, Job, Setting
from ranker.paper.markdown import cell, table
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.paper.table2 import Choice, choose, final_jobs, search_jobs
from ranker.paper.table2_sections import LABELS, best_runs, significance

# Three values, a decade apart, from the paper's own downward: as many as each of the others has.
LAMBDA_ABS: Grids = {"clippy": ("optim.lambda_abs", (1e-2, 1e-3, 1e-4))}
SEARCH, FINAL = "table2_clippy_search", "table2_clippy_final"


def _chosen(data: Data, found: Found) -> dict[tuple[str, str], Choice]:
    return choose(found[SEARCH], f"{data.auc}/auc", grids=LAMBDA_ABS)


def _sections(data: Data, found: Found) -> Sections:
    chosen = _chosen(data, found)
    models = [model for model in PAPER_MODELS if (model, "clippy") in chosen]
    given = choose(found["table2_search"], f"{data.auc}/auc")
    best = best_runs(found["table2_final"], given, models)
    searched = best_runs(found[FINAL], chosen, models)
    return {
        "best": _best(data, best, searched, chosen),
        "search": _search(data, found[SEARCH]),
        "significance": significance(data, best | searched, models),
    }


def _best(
    data: Data,
    best: dict[tuple[str, str], pl.DataFrame],
    searched: dict[tuple[str, str], pl.DataFrame],
    chosen: dict[tuple[str, str], Choice],
) -> str:
    """Table 2's clipped methods, and beside them Clippy with its lambda_abs searched, each at its better rate."""
    rows = []
    for model in (model for model in PAPER_MODELS if (model, "clippy") in searched):
        runs, choice = searched[model, "clippy"], chosen[model, "clippy"]
        limit = choice.thresholds[choice.lr_mult]
        for metric in (f"{data.auc}/auc", f"{data.rmse}/rmse"):
            task, kind = metric.split("/")
            theirs = [cell(best[model, name], metric) for name in METHODS[1:]]
            mine = cell(runs, metric) + (f" ({choice.lr_mult}x, {limit:g})" if kind == "auc" else "")
            rows.append([f"{LABELS[model]}, {task} {kind.upper()}", *theirs, mine])
    paper = [f"{name}, the paper's lambdas" if name == "clippy" else name for name in METHODS[1:]]
    return table(["model and metric", *paper, "clippy, lambda_abs searched"], rows)


def _search(data: Data, search: pl.DataFrame) -> str:
    """AUC on the validation day, one seed."""
    key, values = LAMBDA_ABS["clippy"]
    rows = []
    for (model, rate), runs in search.group_by(["model", "lr_mult"], maintain_order=True):
        cells = [cell(runs.filter(pl.col(key) == value), f"{data.auc}/auc") for value in values]
        rows.append([LABELS[str(model)], f"{rate:g}x", *cells])
    return table(["model", "lr", *(f"lambda_abs {value:g}" for value in values)], rows)


def _search_jobs(setting: Setting) -> list[Job]:
    return search_jobs(setting, methods=("clippy",), grids=LAMBDA_ABS)


STUDY = Study(
    name="table2_clippy",
    title="As table 2, with Clippy's lambda_abs searched on the validation day too",
    phases=(
        Phase(SEARCH, lambda setting, _: _search_jobs(setting)),
        Phase(FINAL, lambda setting, found: final_jobs(setting, _chosen(setting.data, found), grids=LAMBDA_ABS)),
    ),
    sections=_sections,
    needs=("table2",),
)
