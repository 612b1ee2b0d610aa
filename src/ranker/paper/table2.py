"""Table 2: models by methods, each with the best of the same number of (G_0, rate, threshold) combinations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import polars as pl

from ranker.paper.jobs import LABELS, MORE_MODELS, PAPER_MODELS, Data, Job, Setting, grid
from ranker.paper.rendering import cell
from ranker.paper.search import (
    METHODS,
    SEARCHED,
    Point,
    choose,
    first_points,
    next_points,
    ranked,
    search_jobs,
)
from ranker.paper.store import collect
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown

BASELINES = ("gc", "agc", "lamb")
# AUC in percent with the best learning rate, and RMSE, from table 2 of the paper. Naive Adagrad diverged there.
PAPER: Mapping[tuple[str, str], Sequence[str]] = {  # GC, AGC, LAMB, Clippy
    ("small", "auc"): ("71.68 ± 0.13 (2x)", "71.73 ± 0.00 (1x)", "71.56 ± 0.01 (1x)", "71.79 ± 0.00 (2x)"),
    ("small", "rmse"): ("1.058 ± 0.002", "1.059 ± 0.003", "1.063 ± 0.001", "1.056 ± 0.000"),
    ("large", "auc"): ("72.07 ± 0.05 (2x)", "72.09 ± 0.02 (1x)", "72.01 ± 0.09 (1x)", "72.16 ± 0.02 (2x)"),
    ("large", "rmse"): ("1.053 ± 0.003", "1.051 ± 0.001", "1.054 ± 0.002", "1.051 ± 0.000"),
    ("large_dcn", "auc"): ("72.27 ± 0.03 (1x)", "72.06 ± 0.08 (2x)", "72.05 ± 0.11 (1x)", "72.37 ± 0.01 (2x)"),
    ("large_dcn", "rmse"): ("1.049 ± 0.001", "1.051 ± 0.001", "1.057 ± 0.001", "1.047 ± 0.001"),
}


Choices = Mapping[tuple[str, str], Point]
"""The chosen combination by model and method."""
Runs = Mapping[tuple[str, str], pl.DataFrame]
"""Runs by model and method."""


def first_jobs(setting: Setting, models: Sequence[str]) -> list[Job]:
    """The first stage of the search."""
    return search_jobs(setting, _first(setting, models))


def next_jobs(setting: Setting, models: Sequence[str], first: pl.DataFrame) -> list[Job]:
    """The second stage of the search.

    Args:
        setting: data, scale, number of trials.
        models: of the study.
        first: runs of the first stage.
    """
    tried = _first(setting, models)
    best = choose(first.filter(pl.col("status") == "completed"), f"{setting.data.auc}/auc")
    points = {key: next_points(key[1], done, best.get(key), setting.trials) for key, done in tried.items()}
    return search_jobs(setting, points)


def _first(setting: Setting, models: Sequence[str]) -> dict[tuple[str, str], list[Point]]:
    return {
        (model, method): first_points(method, setting.trials)
        for model in setting.models_of(models)
        for method in METHODS
    }


def read_search(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:
    """The rows of a search, with the number of trials that each method had."""
    runs, missing = collect(folder, jobs)
    return runs.with_columns(trials=pl.lit(setting.trials)) if runs.height else runs, missing


def final_jobs(setting: Setting, chosen: Choices) -> list[Job]:
    """The whole training log and the test day, several seeds, with the chosen combination of each method."""
    return [
        job
        for (model, method), point in sorted(chosen.items())
        if setting.models is None or model in setting.models
        for job in grid(setting.bare, {**point.axes(model, method), "seed": setting.seed_list})
    ]


def by_method(runs: pl.DataFrame, models: Sequence[str]) -> dict[tuple[str, str], pl.DataFrame]:
    """The runs of each model and method."""
    return {
        (model, method): runs.filter((pl.col("model") == model) & (pl.col("method") == method))
        for model in models
        for method in METHODS
    }


def searches(name: str, found: Found) -> pl.DataFrame:
    """Both stages of the search of a study."""
    return pl.concat([found[f"{name}_search"], found[f"{name}_refine"]], how="diagonal_relaxed")


def choices(name: str, data: Data, found: Found) -> dict[tuple[str, str], Point]:
    """The choices of a study, also for studies that build on it."""
    return choose(searches(name, found), f"{data.auc}/auc")


def table2_sections(name: str, models: Sequence[str], data: Data, found: Found) -> Sections:
    """The Markdown tables.

    Args:
        name: of the study.
        models: rows, in order.
        data: the data set.
        found: its results.
    """
    runs, search = found[f"{name}_final"], searches(name, found)
    chosen = choices(name, data, found)
    models = [model for model in models if model in runs["model"].unique()]
    best = by_method(runs, models)
    return {
        "best": _best(data, best, models, ("auc", "rmse")),
        "auc": _best(data, best, models, ("auc",)),
        "chosen": _chosen(data, search, chosen, models),
        "significance": significance(data, best, models),
        "tasks": _tasks(data, best, models),
        "cost": _cost(best, models),
    }


def _best(data: Data, best: Runs, models: Sequence[str], kinds: Sequence[str]) -> str:
    """Each method with its chosen combination, and the paper's numbers below."""
    rows = []
    for model in models:
        for kind in kinds:
            task = {"auc": data.auc, "rmse": data.rmse}[kind]
            cells = [cell(best[model, method], f"{task}/{kind}") for method in METHODS]
            rows.append([f"{LABELS[model]}, {task} {kind.upper()}", *cells])
            if (model, kind) in PAPER:
                rows.append([f"*paper, {kind.upper()}*", "*diverged*", *(f"*{n}*" for n in PAPER[model, kind]), ""])
    return as_markdown(["model and metric", *(method.label for method in METHODS.values())], rows)


def _chosen(data: Data, search: pl.DataFrame, chosen: Choices, models: Sequence[str]) -> str:
    """The chosen combinations, and how many were tried and lost on the way."""
    rows = []
    for model in models:
        for name, method in METHODS.items():
            mine = search.filter((pl.col("model") == model) & (pl.col("method") == name))
            if mine.is_empty():
                continue
            point, best = chosen[model, name], ranked(mine, f"{data.auc}/auc").row(0, named=True)
            key = "-" if method.key is None else f"{method.key.removeprefix('optim.')} {point.threshold:g}"
            auc = f"{100 * best[f'{data.auc}/auc']:.2f}" if best["status"] == "completed" else "none completed"
            lost = mine.filter(pl.col("status") != "completed").height
            rows.append(
                [
                    LABELS[model],
                    method.label,
                    f"{point.g0:g}",
                    f"{point.lr_mult:g}x",
                    key,
                    auc,
                    f"{mine.height}, {lost} of them lost",
                ]
            )
    head = ["model", "method", "G_0", "learning rate", "threshold", f"{data.auc} AUC on the validation day"]
    return as_markdown([*head, "combinations tried"], rows)


def _tasks(data: Data, best: Runs, models: Sequence[str]) -> str:
    rows = []
    for model in models:
        for task in data.tasks:
            kind = "auc" if f"{task}/auc" in best[model, "clippy"].columns else "rmse"
            cells = [cell(best[model, method], f"{task}/{kind}") for method in METHODS]
            rows.append([LABELS[model], f"{task} {kind.upper()}", *cells])
    return as_markdown(["model", "task and metric", *(method.label for method in METHODS.values())], rows)


def significance(data: Data, best: Runs, models: Sequence[str]) -> str:
    """Student's paired t-test over seeds: both Clippys against the baseline with the best mean on the test day.

    Choosing the baseline on the test day favours the baseline.
    """
    rows = []
    for model in models:
        scores = {m: _by_seed(best[model, m], f"{data.auc}/auc") for m in METHODS if (model, m) in best}
        means = {m: sum(s.values()) / len(s) for m, s in scores.items() if s and m in BASELINES}
        for mine in ("clippy", SEARCHED):
            if not means or not scores.get(mine):
                rows.append([LABELS[model], METHODS[mine].label, "-", "-", "-", "-", "0"])
                continue
            rival = max(means, key=lambda m: means[m])
            seeds = sorted(scores[mine].keys() & scores[rival].keys())
            pairs = [(100 * scores[mine][s], 100 * scores[rival][s]) for s in seeds]
            difference, low, high, p = _paired_t(pairs)
            interval = f"{low:+.2f} to {high:+.2f}" if len(seeds) > 1 else "-"
            shown = [f"{difference:+.2f}" if seeds else "-", interval, f"{p:.3f}" if len(seeds) > 1 else "-"]
            rows.append([LABELS[model], METHODS[mine].label, rival, *shown, str(len(seeds))])
    head = ["model", "Clippy", "best baseline", "Clippy minus it, AUC points", "95 % interval", "p", "seeds"]
    return as_markdown(head, rows)


def _paired_t(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Mean difference (first minus second), its 95 % interval, and two-sided p-value; nan for fewer than 2 pairs."""
    from scipy.stats import ttest_rel

    differences = [a - b for a, b in pairs]
    mean = sum(differences) / len(differences) if differences else math.nan
    if len(differences) < 2:
        return mean, math.nan, math.nan, math.nan
    if len(set(differences)) == 1:  # no variance, where t is not defined
        return mean, mean, mean, 0.0 if mean else 1.0
    test = ttest_rel(*zip(*pairs, strict=True))
    interval = test.confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high), float(test.pvalue)


def _cost(best: Runs, models: Sequence[str]) -> str:
    rows = []
    for model in models:
        speeds = [max(best[model, m]["examples_per_second"].to_list(), default=None) for m in METHODS]
        rows.append([LABELS[model], *("-" if speed is None else f"{speed:,.0f}" for speed in speeds)])
    note = "No benchmark: other jobs ran beside these on the same cores. docs/optim-benchmark.md is one.\n\n"
    return note + as_markdown(["model, examples a second (fastest run)", *(m.label for m in METHODS.values())], rows)


def _by_seed(runs: pl.DataFrame, metric: str) -> dict[int, float]:
    kept = runs.filter(pl.col("status") == "completed")
    return dict(zip(kept["seed"].to_list(), kept[metric].to_list(), strict=True))


def _study(name: str, title: str, models: Sequence[str]) -> Study:
    search, refine, final = f"{name}_search", f"{name}_refine", f"{name}_final"
    return Study(
        name=name,
        title=title,
        phases=(
            Phase(search, lambda setting, _: first_jobs(setting, models), read=read_search),
            Phase(refine, lambda setting, found: next_jobs(setting, models, found[search]), read=read_search),
            Phase(final, lambda setting, found: final_jobs(setting, choices(name, setting.data, found))),
        ),
        sections=partial(table2_sections, name, models),
    )


TABLE2 = _study("table2", "Table 2, five methods on the paper's three models", PAPER_MODELS)
SOFT_SHARING = _study(
    "table2_soft", "As table 2, on softly shared bottoms (MMoE and PLE), which the paper's table has not", MORE_MODELS
)
