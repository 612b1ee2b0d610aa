"""Table 2: models by methods, each with its best threshold and rate; and with Clippy's lambda_abs searched too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import polars as pl

from ranker.paper.jobs import LABELS, METHODS, MORE_MODELS, PAPER_MODELS, THRESHOLDS, Data, Grids, Job, Setting, grid
from ranker.paper.rendering import cell, spread
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown

RATES = (1, 2)
BASELINES = ("gc", "agc", "lamb")
# Clippy's lambda_abs: three values, a decade apart, downward from the paper's own; as many as the other methods have.
LAMBDA_ABS: Grids = {"clippy": ("optim.lambda_abs", (1e-2, 1e-3, 1e-4))}
# AUC in percent with the best learning rate, and RMSE, from table 2 of the paper. Naive Adagrad diverged there.
PAPER: Mapping[tuple[str, str], Sequence[str]] = {  # in the order of METHODS, without Adagrad
    ("small", "auc"): ("71.68 ± 0.13 (2x)", "71.73 ± 0.00 (1x)", "71.56 ± 0.01 (1x)", "71.79 ± 0.00 (2x)"),
    ("small", "rmse"): ("1.058 ± 0.002", "1.059 ± 0.003", "1.063 ± 0.001", "1.056 ± 0.000"),
    ("large", "auc"): ("72.07 ± 0.05 (2x)", "72.09 ± 0.02 (1x)", "72.01 ± 0.09 (1x)", "72.16 ± 0.02 (2x)"),
    ("large", "rmse"): ("1.053 ± 0.003", "1.051 ± 0.001", "1.054 ± 0.002", "1.051 ± 0.000"),
    ("large_dcn", "auc"): ("72.27 ± 0.03 (1x)", "72.06 ± 0.08 (2x)", "72.05 ± 0.11 (1x)", "72.37 ± 0.01 (2x)"),
    ("large_dcn", "rmse"): ("1.049 ± 0.001", "1.051 ± 0.001", "1.057 ± 0.001", "1.047 ± 0.001"),
}


class Choice(NamedTuple):
    """Hyperparameters chosen on the validation day for one model and method.

    Attributes:
        lr_mult: the better learning rate.
        thresholds: the best threshold at each learning rate; None for a method without one.
    """

    lr_mult: int
    thresholds: Mapping[int, float | None]


Choices = Mapping[tuple[str, str], Choice]
"""By model and method."""
Runs = Mapping[tuple[str, str], pl.DataFrame]
"""Runs by model and method."""


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
            jobs += grid((*setting.bare, *setting.data.validation), {**axes, "seed": (0,)})
    return jobs


def choose(search: pl.DataFrame, metric: str, *, grids: Grids = THRESHOLDS) -> dict[tuple[str, str], Choice]:
    """The best threshold at each learning rate, and the better rate, by one metric on the validation day.

    A completed run is always preferred to one that did not complete. If none completed, the first of the grid is used.

    Args:
        search: runs of phase 1, one per cell.
        metric: higher is better, such as ``is_click/auc``.
        grids: key and values of the search, by method.
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


def choices(setting: Setting, found: Found) -> dict[tuple[str, str], Choice]:
    """The choices of table 2, for studies that build on it."""
    return choose(found["table2_search"], f"{setting.data.auc}/auc")


def final_jobs(setting: Setting, chosen: Choices, *, grids: Grids = THRESHOLDS) -> list[Job]:
    """Phase 2: the whole training log and the test day, several seeds, at both learning rates."""
    jobs = []
    for (model, method), choice in sorted(chosen.items()):
        for rate in RATES:
            axes: dict[str, Sequence[object]] = {"model": (model,), "optim": (method,), "lr_mult": (rate,)}
            if method in grids:
                axes[grids[method][0]] = (choice.thresholds[rate],)
            jobs += grid(setting.bare, {**axes, "seed": setting.seed_list})
    return jobs


def best_runs(runs: pl.DataFrame, chosen: Choices, models: Sequence[str]) -> dict[tuple[str, str], pl.DataFrame]:
    """The runs of all seeds at the better learning rate of each model and method."""
    return {
        (model, method): runs.filter(
            (pl.col("model") == model) & (pl.col("optim") == method) & (pl.col("lr_mult") == choice.lr_mult)
        )
        for (model, method), choice in chosen.items()
        if model in models
    }


def table2_sections(data: Data, runs: pl.DataFrame, chosen: Choices, models: Sequence[str]) -> Sections:
    """The Markdown tables.

    Args:
        data: the data set.
        runs: of phase 2.
        chosen: from ``choose``.
        models: rows, in order.
    """
    models = [model for model in models if model in runs["model"].unique()]
    best = best_runs(runs, chosen, models)
    return {
        "best": _best(data, best, chosen, models),
        "rates": _rates(data, runs, models),
        "tasks": _tasks(data, best, models),
        "chosen": _chosen(chosen, models),
        "significance": significance(data, best, models),
        "cost": _cost(best, models),
    }


def _best(data: Data, best: Runs, chosen: Choices, models: Sequence[str]) -> str:
    """Each method with its best threshold and rate, and the paper's numbers below."""
    rows = []
    for model in models:
        for task, kind in ((data.auc, "auc"), (data.rmse, "rmse")):
            ours = [f"{LABELS[model]}, {task} {kind.upper()}"]
            for method in METHODS:
                rate = f" ({chosen[model, method].lr_mult}x)" if kind == "auc" else ""
                ours.append(cell(best[model, method], f"{task}/{kind}") + rate)
            rows.append(ours)
            if (model, kind) in PAPER:
                rows.append([f"*paper, {kind.upper()}*", "*diverged*", *(f"*{n}*" for n in PAPER[model, kind])])
    return as_markdown(["model and metric", *METHODS], rows)


def _rates(data: Data, runs: pl.DataFrame, models: Sequence[str]) -> str:
    """AUC at both rates, each with its own best threshold."""
    rows = []
    for model in models:
        for rate in RATES:
            here = runs.filter((pl.col("model") == model) & (pl.col("lr_mult") == rate))
            cells = [cell(here.filter(pl.col("optim") == method), f"{data.auc}/auc") for method in METHODS]
            rows.append([LABELS[model], f"{rate}x", *cells])
    return as_markdown(["model", "lr", *METHODS], rows)


def _tasks(data: Data, best: Runs, models: Sequence[str]) -> str:
    rows = []
    for model in models:
        for task in data.tasks:
            kind = "auc" if f"{task}/auc" in best[model, METHODS[-1]].columns else "rmse"
            cells = []
            for method in METHODS:
                kept = best[model, method].filter(pl.col("status") == "completed")
                cells.append(spread(kept[f"{task}/{kind}"].to_list(), percent=kind == "auc") or "-")
            rows.append([LABELS[model], f"{task} {kind.upper()}", *cells])
    return as_markdown(["model", "task and metric", *METHODS], rows)


def _chosen(chosen: Choices, models: Sequence[str]) -> str:
    rows = []
    for model in models:
        for method in METHODS:
            choice = chosen[model, method]
            limits = [choice.thresholds[rate] for rate in RATES]
            shown = ["none" if limit is None else f"{limit:g}" for limit in limits]
            key = THRESHOLDS[method][0].removeprefix("optim.") if method in THRESHOLDS else "-"
            rows.append([LABELS[model], method, key, *shown, f"{choice.lr_mult}x"])
    return as_markdown(["model", "method", "threshold", "best at 1x", "best at 2x", "better rate"], rows)


def significance(data: Data, best: Runs, models: Sequence[str]) -> str:
    """Student's paired t-test over seeds: Clippy against the baseline with the best mean on the test day.

    Choosing the baseline on the test day favours the baseline.
    """
    rows = []
    for model in models:
        scores = {method: _by_seed(best[model, method], f"{data.auc}/auc") for method in (*BASELINES, "clippy")}
        means = {m: sum(s.values()) / len(s) for m, s in scores.items() if s}
        rivals = {m: v for m, v in means.items() if m != "clippy"}
        if not rivals or "clippy" not in means:
            rows.append([LABELS[model], "-", "-", "-", "-", "0"])
            continue
        rival = max(rivals, key=lambda m: rivals[m])
        seeds = sorted(scores["clippy"].keys() & scores[rival].keys())
        pairs = [(100 * scores["clippy"][s], 100 * scores[rival][s]) for s in seeds]
        difference, low, high, p = _paired_t(pairs)
        interval = f"{low:+.2f} to {high:+.2f}"
        rows.append([LABELS[model], rival, f"{difference:+.2f}", interval, f"{p:.3f}", str(len(seeds))])
    return as_markdown(["model", "best baseline", "Clippy minus it, AUC points", "95 % interval", "p", "seeds"], rows)


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
        speeds = [max(best[model, method]["examples_per_second"].to_list()) for method in METHODS]
        rows.append([LABELS[model], *(f"{speed:,.0f}" for speed in speeds)])
    note = "No benchmark: other jobs ran beside these on the same cores. docs/optim-benchmark.md is one.\n\n"
    return note + as_markdown(["model, examples a second (fastest run)", *METHODS], rows)


def _by_seed(runs: pl.DataFrame, metric: str) -> dict[int, float]:
    kept = runs.filter(pl.col("status") == "completed")
    return dict(zip(kept["seed"].to_list(), kept[metric].to_list(), strict=True))


def _clippy_choices(data: Data, found: Found) -> dict[tuple[str, str], Choice]:
    return choose(found["table2_clippy_search"], f"{data.auc}/auc", grids=LAMBDA_ABS)


def _clippy_sections(data: Data, found: Found) -> Sections:
    chosen = _clippy_choices(data, found)
    models = [model for model in PAPER_MODELS if (model, "clippy") in chosen]
    given = choose(found["table2_search"], f"{data.auc}/auc")
    best = best_runs(found["table2_final"], given, models)
    searched = best_runs(found["table2_clippy_final"], chosen, models)
    return {
        "best": _clippy_best(data, best, searched, chosen),
        "search": _clippy_search(data, found["table2_clippy_search"]),
        "significance": significance(data, best | searched, models),
    }


def _clippy_best(data: Data, best: Runs, searched: Runs, chosen: Choices) -> str:
    """The clipped methods of table 2 and Clippy with its lambda_abs searched, each at its better rate."""
    rows = []
    for model in (model for model in PAPER_MODELS if (model, "clippy") in searched):
        runs, choice = searched[model, "clippy"], chosen[model, "clippy"]
        limit = choice.thresholds[choice.lr_mult]
        for task, kind in ((data.auc, "auc"), (data.rmse, "rmse")):
            theirs = [cell(best[model, name], f"{task}/{kind}") for name in METHODS[1:]]
            mine = cell(runs, f"{task}/{kind}") + (f" ({choice.lr_mult}x, {limit:g})" if kind == "auc" else "")
            rows.append([f"{LABELS[model]}, {task} {kind.upper()}", *theirs, mine])
    paper = [f"{name}, the paper's lambdas" if name == "clippy" else name for name in METHODS[1:]]
    return as_markdown(["model and metric", *paper, "clippy, lambda_abs searched"], rows)


def _clippy_search(data: Data, search: pl.DataFrame) -> str:
    """AUC on the validation day, one seed."""
    key, values = LAMBDA_ABS["clippy"]
    rows = []
    for (model, rate), runs in search.group_by(["model", "lr_mult"], maintain_order=True):
        cells = [cell(runs.filter(pl.col(key) == value), f"{data.auc}/auc") for value in values]
        rows.append([LABELS[str(model)], f"{rate:g}x", *cells])
    return as_markdown(["model", "lr", *(f"lambda_abs {value:g}" for value in values)], rows)


def _study(name: str, title: str, models: Sequence[str]) -> Study:
    search, final = f"{name}_search", f"{name}_final"
    chosen: Callable[[Data, Found], Choices] = lambda data, found: choose(found[search], f"{data.auc}/auc")  # noqa: E731
    return Study(
        name=name,
        title=title,
        phases=(
            Phase(search, lambda setting, _: search_jobs(setting, models=models)),
            Phase(final, lambda setting, found: final_jobs(setting, chosen(setting.data, found))),
        ),
        sections=lambda data, found: table2_sections(data, found[final], chosen(data, found), models),
    )


TABLE2 = _study("table2", "Table 2, five methods on the paper's three models", PAPER_MODELS)
SOFT_SHARING = _study(
    "table2_soft", "As table 2, on softly shared bottoms (MMoE and PLE), which the paper's table has not", MORE_MODELS
)
SEARCHED_CLIPPY = Study(
    name="table2_clippy",
    title="As table 2, with Clippy's lambda_abs searched on the validation day too",
    phases=(
        Phase("table2_clippy_search", lambda setting, _: search_jobs(setting, methods=("clippy",), grids=LAMBDA_ABS)),
        Phase(
            "table2_clippy_final",
            lambda setting, found: final_jobs(setting, _clippy_choices(setting.data, found), grids=LAMBDA_ABS),
        ),
    ),
    sections=_clippy_sections,
    needs=("table2",),
)
