"""Table 2: the choice on the validation day, the final jobs, and the tables with their significance test."""

from __future__ import annotations

import polars as pl

from ranker.paper import table2
from ranker.paper.jobs import DATA, METHODS, Setting

KEY = "optim.lambda_abs"
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
    made = table2.table2_sections(SETTING.data, final_runs(), chosen, ["small"])
    first, second = made["best"].splitlines()[2:4]
    assert "| diverged 2 of 2 (2x) | 66.50 ± 0.71 (2x) |" in first
    assert "*71.68 ± 0.13 (2x)*" in second
    # against gc, the best baseline: differences of 2 and 3 points, t = 2.5 / 0.5 = 5 with one degree of freedom
    assert "| Small | gc | +2.50 | -3.85 to +8.85 | 0.126 | 2 |" in made["significance"]


def clippy_run(method: str, rate: int, auc: float, seed: int = 0, **more: object) -> dict[str, object]:
    standard = {"model": "small", "optim": method, "lr_mult": rate, "seed": seed, "status": "completed"}
    return standard | {"is_click/auc": auc, "watch_time/rmse": 1.25} | more


def found() -> dict[str, pl.DataFrame]:
    aucs = {(1, 1e-2): 0.61, (1, 1e-3): 0.65, (2, 1e-2): 0.60, (2, 1e-3): 0.66, (2, 1e-4): 0.64}
    thresholds = {"optim.clip_norm": 0.1, "optim.clip_factor": 0.01, "optim.trust_coefficient": 0.01}
    return {
        "table2_search": pl.DataFrame([clippy_run(method, 2, 0.6, **thresholds) for method in METHODS]),
        "table2_final": pl.DataFrame(
            [clippy_run(m, 2, 0.60 + 0.01 * i + 0.02 * s, seed=s) for i, m in enumerate(METHODS) for s in (0, 1)]
        ),
        "table2_clippy_search": pl.DataFrame(
            [clippy_run("clippy", r, auc, **{KEY: a}) for (r, a), auc in aucs.items()]
        ),
        "table2_clippy_final": pl.DataFrame(
            [clippy_run("clippy", r, 0.65 + 0.01 * r + 0.01 * s, seed=s, **{KEY: 1e-3}) for r in (1, 2) for s in (0, 1)]
        ),
    }


def test_it_searches_without_the_test_day_and_trains_with_what_was_best_at_each_rate() -> None:
    search, final = table2.SEARCHED_CLIPPY.phases
    jobs = search.jobs(SETTING, {})
    assert len(jobs) == 3 * 2 * 3
    assert all("data.days=[2022-04-25,2022-05-07]" in job and "optim=clippy" in job for job in jobs)
    jobs = final.jobs(SETTING, found())
    assert [job[-4:] for job in jobs] == [
        ("optim=clippy", f"lr_mult={rate}", f"{KEY}=0.001", f"seed={seed}") for rate in (1, 2) for seed in (0, 1)
    ]
    assert not any(override.startswith("data.days") for job in jobs for override in job)


def test_the_table_has_both_clippys_and_the_comparison_takes_the_searched_one() -> None:
    made = table2.SEARCHED_CLIPPY.sections(SETTING.data, found())
    assert made["best"].splitlines()[2] == (
        "| Small, is_click AUC | 62.00 ± 1.41 | 63.00 ± 1.41 | 64.00 ± 1.41 | 65.00 ± 1.41 | 67.50 ± 0.71 (2x, 0.001) |"
    )
    assert made["search"].splitlines()[2:] == [
        "| Small | 1x | 61.00 | 65.00 | - |",
        "| Small | 2x | 60.00 | 66.00 | 64.00 |",
    ]
    # against lamb, the best baseline: 67 - 63 and 68 - 65, not table 2's own clippy (64 and 66)
    assert "| Small | lamb | +3.50 |" in made["significance"]


def compared(clippy: list[float], gc: list[float]) -> str:
    """The row that compares Clippy with its best baseline, from AUCs by seed."""
    best = {}
    for method, aucs in {"clippy": clippy, "gc": gc, "agc": [], "lamb": []}.items():
        rows = [{"seed": s, "status": "completed", "is_click/auc": auc} for s, auc in enumerate(aucs)]
        schema = {"seed": pl.Int64, "status": pl.String, "is_click/auc": pl.Float64}
        best["small", method] = pl.DataFrame(rows, schema=schema)
    return table2.significance(SETTING.data, best, ["small"]).splitlines()[2]


def test_a_paired_difference_by_hand() -> None:
    # d = 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom;
    # P(abs(T) <= t) = t / sqrt(2 + t^2) there, and the 0.975 quantile is 4.30265: 2 -+ 4.30265 / sqrt(3).
    row = compared([0.02, 0.04, 0.06], [0.01, 0.02, 0.03])
    assert row == "| Small | gc | +2.00 | -0.48 to +4.48 | 0.074 | 3 |"


def test_one_pair_has_a_difference_but_no_significance() -> None:
    assert compared([0.75], [0.5]) == "| Small | gc | +25.00 | +nan to +nan | nan | 1 |"


def test_equal_differences_are_certain_and_no_difference_is_not() -> None:
    assert compared([0.75, 1.0], [0.5, 0.75]) == "| Small | gc | +25.00 | +25.00 to +25.00 | 0.000 | 2 |"
    assert compared([0.75, 1.0], [0.75, 1.0]) == "| Small | gc | +0.00 | +0.00 to +0.00 | 1.000 | 2 |"
