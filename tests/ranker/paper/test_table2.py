"""Table 2: the search with the same budget for every method, the final jobs, and the tables with their test."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from ranker.paper import search, table2
from ranker.paper.jobs import DATA, Setting
from ranker.paper.search import G_0, G_KEY, METHODS, RATES, SEARCHED, Point

SETTING = Setting(DATA["kuairand"], seeds=2, models=("small",))


def keyed(job: tuple[str, ...]) -> dict[str, str]:
    return dict(override.split("=", 1) for override in job)


def test_every_method_has_the_same_budget_and_first_the_same_g0_and_rates() -> None:
    for trials in (1, 8, 30):
        for method in METHODS:
            first = search.first_points(method, trials)
            more = search.next_points(method, first, first[0], trials)
            assert len({*first, *more}) == trials
            assert all(p.g0 in G_0 and p.lr_mult in RATES for p in (*first, *more))
            limits = {p.threshold for p in (*first, *more)}
            assert limits <= set(METHODS[method].values or (None,))
    pairs = {m: [(p.g0, p.lr_mult) for p in search.first_points(m, 8)] for m in METHODS}
    assert len(set(map(tuple, pairs.values()))) == 1
    assert len(set(pairs["gc"])) == search.first_stage(8) == 5


def test_a_budget_beyond_the_space_ends_with_the_space() -> None:
    first = search.first_points("adagrad", 1000)
    assert len(first) == len(G_0) * len(RATES)
    assert search.next_points("adagrad", first, first[0], 1000) == []


def test_the_second_stage_begins_with_the_neighbours_of_the_best() -> None:
    best = Point(1e-4, 0.25, 0.1)
    found = search.next_points("gc", [best, Point(1e-4, 0.5, 0.1)], best, 5)
    assert found == [Point(1e-6, 0.25, 0.1), Point(1e-4, 0.25, 0.01), Point(1e-4, 0.125, 0.1)]


def test_the_search_never_reads_the_test_day_and_the_final_runs_do() -> None:
    first = table2.first_jobs(SETTING, ("small", "large"))
    assert len(first) == len(METHODS) * search.first_stage(SETTING.trials)
    assert all("data.days=[2022-04-25,2022-05-07]" in job and "seed=0" in job for job in first)
    made = table2.final_jobs(
        SETTING, {("small", SEARCHED): Point(1e-6, 0.5, 1e-3), ("large", "gc"): Point(0.1, 1, 0.1)}
    )
    assert [keyed(job)["seed"] for job in made] == ["0", "1"]
    assert not any(override.startswith("data.days") for job in made for override in job)
    wanted = {
        "optim": "clippy",
        "lr_mult": "0.5",
        G_KEY: "1e-06",
        "optim.lambda_abs": "0.001",
    }
    assert wanted.items() <= keyed(made[0]).items()


def trial(method: str, point: Point, auc: float | None, status: str = "completed") -> dict[str, Any]:
    tried = METHODS[method]
    row = {"model": "small", "method": method, "optim": tried.optim, "status": status, "is_click/auc": auc}
    row |= {"lr_mult": point.lr_mult, G_KEY: point.g0}
    return row | ({tried.key: point.threshold} if tried.key else {})


def test_the_best_combination_is_chosen_and_a_lost_run_never() -> None:
    rows = [
        trial("gc", Point(0.1, 1.0, 0.1), 0.70, "diverged"),
        trial("gc", Point(0.01, 1.0, 0.1), 0.65),
        trial("gc", Point(0.01, 2.0, 0.01), None),
        trial("adagrad", Point(0.1, 0.5, None), 0.5, "diverged"),
        trial("adagrad", Point(0.1, 1.0, None), 0.9, "diverged"),
    ]
    chosen = search.choose(pl.DataFrame(rows, infer_schema_length=None), "is_click/auc")
    assert chosen["small", "gc"] == Point(0.01, 1.0, 0.1)
    assert chosen["small", "adagrad"] == Point(0.1, 0.5, None), "where all are lost, the first that was tried"


def test_the_second_stage_starts_from_the_best_of_the_first() -> None:
    first = [trial(m, p, 0.6 + 0.01 * i) for m in METHODS for i, p in enumerate(search.first_points(m, 8))]
    jobs = table2.next_jobs(SETTING, ("small",), pl.DataFrame(first, infer_schema_length=None))
    assert len(jobs) == 3 * len(METHODS)
    naive = [keyed(job) for job in jobs if "tags=[adagrad]" in job]
    best = search.first_points("adagrad", 8)[-1]
    assert (best.g0, best.lr_mult) == (1e-6, 2.0)
    assert [(k[G_KEY], k["lr_mult"]) for k in naive] == [("1e-06", "4"), ("1e-08", "2"), ("1e-06", "1")]


def found() -> dict[str, pl.DataFrame]:
    other = {f"{task}/auc": 0.6 for task in SETTING.data.tasks[1:-1]} | {"watch_time/rmse": 1.25}
    rows = []
    aucs = {"gc": (0.66, 0.67), "agc": (0.65, 0.66), "lamb": (0.60, 0.61), "clippy": (0.68, 0.70)}
    for method, scores in (aucs | {SEARCHED: (0.69, 0.70)}).items():
        rows += [trial(method, Point(0.1, 2.0, 0.1), auc) | {"seed": s} for s, auc in enumerate(scores)]
    rows += [trial("adagrad", Point(0.1, 1.0, None), 0.5, "diverged") | {"seed": s} for s in (0, 1)]
    final = pl.DataFrame([row | other | {"examples_per_second": 1e4} for row in rows], infer_schema_length=None)
    search_rows = [trial(m, Point(1e-6, 0.5, 0.1), 0.71) for m in METHODS]
    search_rows += [trial(m, Point(0.1, 4.0, 0.1), 0.5, "diverged") for m in METHODS]
    searched = pl.DataFrame(search_rows, infer_schema_length=None)
    return {"table2_search": searched[:6], "table2_refine": searched[6:], "table2_final": final}


def test_the_table_gives_mean_deviation_and_number_the_count_of_the_lost_and_the_papers_numbers() -> None:
    made = table2.TABLE2.sections(SETTING.data, found())
    first, second = made["best"].splitlines()[2:4]
    assert "| diverged 2 of 2 | 66.50 ± 0.71 (n=2) |" in first
    assert "*71.68 ± 0.13 (2x)*" in second
    assert "| Small | gc | 1e-06 | 0.5x | clip_norm 0.1 | 71.00 | 2, 1 of them lost |" in made["chosen"]
    # against gc, the best baseline: differences of 2 and 3 points, t = 2.5 / 0.5 = 5 with one degree of freedom
    assert "| gc | +2.50 | -3.85 to +8.85 | 0.126 | 2 |" in made["significance"]
    assert "| Small | clippy, lambda_abs searched | gc | +3.00 | +3.00 to +3.00 | 0.000 | 2 |" in made["significance"]


def compared(clippy: list[float], gc: list[float]) -> str:
    """The row that compares Clippy with its best baseline, from AUCs by seed."""
    best = {}
    for method, aucs in {"clippy": clippy, "gc": gc, "agc": [], "lamb": []}.items():
        rows = [{"seed": s, "status": "completed", "is_click/auc": auc} for s, auc in enumerate(aucs)]
        schema = {"seed": pl.Int64, "status": pl.String, "is_click/auc": pl.Float64}
        best["small", method] = pl.DataFrame(rows, schema=schema)
    return table2.significance(SETTING.data, best, ["small"]).splitlines()[2].partition("lambdas ")[2]


@pytest.mark.parametrize(
    ("clippy", "gc", "row"),
    [
        # d = 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom;
        # P(abs(T) <= t) = t / sqrt(2 + t^2) there, and the 0.975 quantile is 4.30265: 2 -+ 4.30265 / sqrt(3).
        ([0.02, 0.04, 0.06], [0.01, 0.02, 0.03], "+2.00 | -0.48 to +4.48 | 0.074 | 3"),
        ([0.75], [0.5], "+25.00 | - | - | 1"),  # one pair has a difference but no significance
        ([0.75, 1.0], [0.5, 0.75], "+25.00 | +25.00 to +25.00 | 0.000 | 2"),
        ([0.75, 1.0], [0.75, 1.0], "+0.00 | +0.00 to +0.00 | 1.000 | 2"),
    ],
)
def test_a_paired_difference_by_hand(clippy: list[float], gc: list[float], row: str) -> None:
    assert compared(clippy, gc) == f"| gc | {row} |"
