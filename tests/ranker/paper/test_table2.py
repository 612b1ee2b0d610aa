"""What the validation day chooses, what is run then, and what the table says."""

from __future__ import annotations

import polars as pl

from ranker.paper import table2, table2_sections
from ranker.paper.jobs import DATA, METHODS, Setting
from ranker.paper.rates import largest_stable

SETTING = Setting(DATA["kuairand"], seeds=2)


def searched(scores: dict[tuple[int, float], tuple[str, float | None]]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "model": "small",
                "optim": "gc",
                "lr_mult": float(rate),
                "optim.clip_norm": limit,
                "status": s,
                "is_click/auc": a,
            }
            for (rate, limit), (s, a) in scores.items()
        ]
    )


def test_the_search_never_reads_the_test_day_and_the_final_runs_do() -> None:
    search = table2.search_jobs(SETTING)
    assert all("data.days=[2022-04-25,2022-05-07]" in job for job in search)
    assert len(search) == 3 * 2 * (1 + 3 + 3 + 3 + 1)
    chosen = {("small", method): table2.Choice(2, {1: 0.1, 2: 0.01}) for method in METHODS}
    final = table2.final_jobs(SETTING, chosen)
    assert len(final) == 5 * 2 * 2
    assert not any(override.startswith("data.days") for job in final for override in job)
    assert ("lr_mult=1", "optim.clip_norm=0.1", "seed=1") in [job[-3:] for job in final]
    assert ("lr_mult=2", "optim.clip_norm=0.01", "seed=0") in [job[-3:] for job in final]


def test_each_rate_keeps_its_best_threshold_and_a_lost_run_is_never_chosen() -> None:
    runs = searched(
        {
            (1, 0.1): ("completed", 0.60),
            (1, 0.01): ("completed", 0.65),
            (2, 0.1): ("diverged", 0.70),
            (2, 0.01): ("completed", None),
            (2, 0.001): ("completed", 0.62),
        }
    )
    choice = table2.choose(runs, "is_click/auc")["small", "gc"]
    assert choice == (1, {1: 0.01, 2: 0.001})


def test_where_all_are_lost_the_first_of_the_grid_is_taken() -> None:
    runs = searched({(1, 0.1): ("diverged", 0.5), (2, 0.1): ("diverged", 0.9)})
    assert table2.choose(runs, "is_click/auc")["small", "gc"].lr_mult == 1


def final_runs() -> pl.DataFrame:
    rows = []
    for method, aucs in {"gc": (0.66, 0.67), "agc": (0.65, 0.66), "lamb": (0.60, 0.61), "clippy": (0.68, 0.70)}.items():
        for seed, auc in enumerate(aucs):
            rows.append({"optim": method, "seed": seed, "status": "completed", "is_click/auc": auc})
    rows += [{"optim": "adagrad", "seed": s, "status": "diverged", "is_click/auc": 0.5} for s in (0, 1)]
    other = {f"{task}/auc": 0.6 for task in SETTING.data.tasks[1:-1]} | {"watch_time/rmse": 1.25}
    common = {"model": "small", "lr_mult": 2, "examples_per_second": 1e4}
    return pl.DataFrame([common | other | row for row in rows])


def test_the_table_gives_mean_and_deviation_the_count_of_the_lost_and_the_papers_numbers() -> None:
    chosen = {("small", method): table2.Choice(2, {1: None, 2: None}) for method in METHODS}
    made = table2_sections.sections(SETTING.data, final_runs(), chosen, ["small"])
    first, second = made["best"].splitlines()[2:4]
    assert "| diverged 2 of 2 (2x) | 66.50 ± 0.71 (2x) |" in first
    assert "*71.68 ± 0.13 (2x)*" in second
    # against gc, the best baseline: differences of 2 and 3 points, t = 2.5 / 0.5 = 5 with one degree of freedom
    assert "| Small | gc | +2.50 | -3.85 to +8.85 | 0.126 | 2 |" in made["significance"]


def test_the_largest_stable_rate_lies_below_the_first_loss() -> None:
    tried = {1: ["completed"] * 2, 2: ["completed"] * 2, 4: ["completed", "diverged"], 8: ["completed"]}
    runs = pl.DataFrame([{"lr_mult": float(m), "status": s} for m, found in tried.items() for s in found])
    assert largest_stable(runs) == 2
    assert largest_stable(runs.filter(pl.col("lr_mult") == 4)) is None
