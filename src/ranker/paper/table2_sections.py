"""What table 2 says, from its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from ranker.paper.jobs import METHODS, THRESHOLDS, Data
from ranker.paper.markdown import cell, spread, table
from ranker.paper.statistics import paired_t
from ranker.paper.study import Sections

BASELINES = ("gc", "agc", "lamb")
LABELS = {"small": "Small", "large": "Large", "large_dcn": "Large+DCN", "moe": "MMoE", "ple": "PLE"}
# AUC in percent and RMSE of the paper's table 2, with the learning rate that was best; naive Adagrad diverged.
PAPER: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("small", "auc"): {
        "gc": "71.68 ± 0.13 (2x)",
        "agc": "71.73 ± 0.00 (1x)",
        "lamb": "71.56 ± 0.01 (1x)",
        "clippy": "71.79 ± 0.00 (2x)",
    },
    ("small", "rmse"): {
        "gc": "1.058 ± 0.002",
        "agc": "1.059 ± 0.003",
        "lamb": "1.063 ± 0.001",
        "clippy": "1.056 ± 0.000",
    },
    ("large", "auc"): {
        "gc": "72.07 ± 0.05 (2x)",
        "agc": "72.09 ± 0.02 (1x)",
        "lamb": "72.01 ± 0.09 (1x)",
        "clippy": "72.16 ± 0.02 (2x)",
    },
    ("large", "rmse"): {
        "gc": "1.053 ± 0.003",
        "agc": "1.051 ± 0.001",
        "lamb": "1.054 ± 0.002",
        "clippy": "1.051 ± 0.000",
    },
    ("large_dcn", "auc"): {
        "gc": "72.27 ± 0.03 (1x)",
        "agc": "72.06 ± 0.08 (2x)",
        "lamb": "72.05 ± 0.11 (1x)",
        "clippy": "72.37 ± 0.01 (2x)",
    },
    ("large_dcn", "rmse"): {
        "gc": "1.049 ± 0.001",
        "agc": "1.051 ± 0.001",
        "lamb": "1.057 ± 0.001",
        "clippy": "1.047 ± 0.001",
    },
}


def sections(data: Data, runs: pl.DataFrame, chosen: Mapping[tuple[str, str], Any], models: Sequence[str]) -> Sections:
    """The tables.

    Args:
        data: the data set.
        runs: of phase 2.
        chosen: what phase 1 chose, by model and method.
        models: rows, in order.
    """
    models = [model for model in models if model in runs["model"].unique()]
    best = best_runs(runs, chosen, models)
    found = {
        "best": _best(data, best, chosen, models),
        "rates": _rates(data, runs, models),
        "tasks": _tasks(data, best, models),
        "chosen": _chosen(chosen, models),
        "significance": significance(data, best, models),
        "cost": _cost(best, models),
    }
    return found


def best_runs(
    runs: pl.DataFrame, chosen: Mapping[tuple[str, str], Any], models: Sequence[str]
) -> dict[tuple[str, str], pl.DataFrame]:
    """The runs at the better learning rate of each model and method, all seeds."""
    return {
        (model, method): runs.filter(
            (pl.col("model") == model) & (pl.col("optim") == method) & (pl.col("lr_mult") == choice.lr_mult)
        )
        for (model, method), choice in chosen.items()
        if model in models
    }


def _best(data: Data, best: Mapping[Any, pl.DataFrame], chosen: Mapping[Any, Any], models: Sequence[str]) -> str:
    """The paper's own table: best threshold and rate of each method, the paper's numbers below."""
    rows = []
    for model in models:
        for task, kind in ((data.auc, "auc"), (data.rmse, "rmse")):
            ours = [f"{LABELS[model]}, {task} {kind.upper()}"]
            for method in METHODS:
                rate = f" ({chosen[model, method].lr_mult}x)" if kind == "auc" else ""
                ours.append(cell(best[model, method], f"{task}/{kind}") + rate)
            rows.append(ours)
            if (model, kind) in PAPER:
                theirs = PAPER[model, kind]
                rows.append([f"*paper, {kind.upper()}*", "*diverged*", *(f"*{theirs[m]}*" for m in METHODS[1:])])
    return table(["model and metric", *METHODS], rows)


def _rates(data: Data, runs: pl.DataFrame, models: Sequence[str]) -> str:
    """AUC at both rates, each with its own best threshold."""
    rows = []
    for model in models:
        for rate in (1, 2):
            here = runs.filter((pl.col("model") == model) & (pl.col("lr_mult") == rate))
            cells = [cell(here.filter(pl.col("optim") == method), f"{data.auc}/auc") for method in METHODS]
            rows.append([LABELS[model], f"{rate}x", *cells])
    return table(["model", "lr", *METHODS], rows)


def _tasks(data: Data, best: Mapping[Any, pl.DataFrame], models: Sequence[str]) -> str:
    rows = []
    for model in models:
        for task in data.tasks:
            kind = "auc" if f"{task}/auc" in best[model, METHODS[-1]].columns else "rmse"
            cells = []
            for method in METHODS:
                kept = best[model, method].filter(pl.col("status") == "completed")
                cells.append(spread(kept[f"{task}/{kind}"].to_list(), percent=kind == "auc") or "-")
            rows.append([LABELS[model], f"{task} {kind.upper()}", *cells])
    return table(["model", "task and metric", *METHODS], rows)


def _chosen(chosen: Mapping[Any, Any], models: Sequence[str]) -> str:
    rows = []
    for model in models:
        for method in METHODS:
            choice = chosen[model, method]
            limits = [choice.thresholds[rate] for rate in (1, 2)]
            shown = ["none" if limit is None else f"{limit:g}" for limit in limits]
            key = THRESHOLDS[method][0].removeprefix("optim.") if method in THRESHOLDS else "-"
            rows.append([LABELS[model], method, key, *shown, f"{choice.lr_mult}x"])
    return table(["model", "method", "threshold", "best at 1x", "best at 2x", "better rate"], rows)


def significance(data: Data, best: Mapping[Any, pl.DataFrame], models: Sequence[str]) -> str:
    """Clippy against whichever baseline has the best mean on the test day, which favours the baseline."""
    rows = []
    metric = f"{data.auc}/auc"
    for model in models:
        scores = {method: _by_seed(best[model, method], metric) for method in (*BASELINES, "clippy")}
        means = {m: sum(s.values()) / len(s) for m, s in scores.items() if s}
        rivals = {m: v for m, v in means.items() if m != "clippy"}
        if not rivals or "clippy" not in means:
            rows.append([LABELS[model], "-", "-", "-", "-", "0"])
            continue
        rival = max(rivals, key=lambda m: rivals[m])
        seeds = sorted(scores["clippy"].keys() & scores[rival].keys())
        test = paired_t([100 * scores["clippy"][s] for s in seeds], [100 * scores[rival][s] for s in seeds])
        interval = f"{test.interval.low:+.2f} to {test.interval.high:+.2f}"
        rows.append([LABELS[model], rival, f"{test.difference:+.2f}", interval, f"{test.p:.3f}", str(test.n)])
    return table(["model", "best baseline", "Clippy minus it, AUC points", "95 % interval", "p", "seeds"], rows)


def _cost(best: Mapping[Any, pl.DataFrame], models: Sequence[str]) -> str:
    rows = []
    for model in models:
        speeds = [max(best[model, method]["examples_per_second"].to_list()) for method in METHODS]
        rows.append([LABELS[model], *(f"{speed:,.0f}" for speed in speeds)])
    note = "No benchmark: other jobs ran beside these on the same cores. docs/optim-benchmark.md is one.\n\n"
    return note + table(["model, examples a second (fastest run)", *METHODS], rows)


def _by_seed(runs: pl.DataFrame, metric: str) -> dict[int, float]:
    kept = runs.filter(pl.col("status") == "completed")
    return dict(zip(kept["seed"].to_list(), kept[metric].to_list(), strict=True))
