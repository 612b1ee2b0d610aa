"""Clippy's lambda_abs is searched as the others' thresholds are, and stands beside table 2's own runs."""

from __future__ import annotations

import polars as pl

from ranker.paper import searched_clippy
from ranker.paper.jobs import DATA, METHODS, Setting

KEY = "optim.lambda_abs"
SETTING = Setting(DATA["kuairand"], seeds=2)


def run(method: str, rate: int, auc: float, seed: int = 0, **more: object) -> dict[str, object]:
    standard = {"model": "small", "optim": method, "lr_mult": rate, "seed": seed, "status": "completed"}
    return standard | {"is_click/auc": auc, "watch_time/rmse": 1.25} | more


def found() -> dict[str, pl.DataFrame]:
    aucs = {(1, 1e-2): 0.61, (1, 1e-3): 0.65, (2, 1e-2): 0.60, (2, 1e-3): 0.66, (2, 1e-4): 0.64}
    thresholds = {"optim.clip_norm": 0.1, "optim.clip_factor": 0.01, "optim.trust_coefficient": 0.01}
    return {
        "table2_search": pl.DataFrame([run(method, 2, 0.6, **thresholds) for method in METHODS]),
        "table2_final": pl.DataFrame(
            [run(m, 2, 0.60 + 0.01 * i + 0.02 * s, seed=s) for i, m in enumerate(METHODS) for s in (0, 1)]
        ),
        searched_clippy.SEARCH: pl.DataFrame([run("clippy", r, auc, **{KEY: a}) for (r, a), auc in aucs.items()]),
        searched_clippy.FINAL: pl.DataFrame(
            [run("clippy", r, 0.65 + 0.01 * r + 0.01 * s, seed=s, **{KEY: 1e-3}) for r in (1, 2) for s in (0, 1)]
        ),
    }


def test_it_searches_without_the_test_day_and_trains_with_what_was_best_at_each_rate() -> None:
    search, final = searched_clippy.STUDY.phases
    jobs = search.jobs(SETTING, {})
    assert len(jobs) == 3 * 2 * 3
    assert all("data.days=[2022-04-25,2022-05-07]" in job and "optim=clippy" in job for job in jobs)
    jobs = final.jobs(SETTING, found())
    assert [job[-4:] for job in jobs] == [
        ("optim=clippy", f"lr_mult={rate}", f"{KEY}=0.001", f"seed={seed}") for rate in (1, 2) for seed in (0, 1)
    ]
    assert not any(override.startswith("data.days") for job in jobs for override in job)


def test_the_table_has_both_clippys_and_the_comparison_takes_the_searched_one() -> None:
    made = searched_clippy.STUDY.sections(SETTING.data, found())
    assert made["best"].splitlines()[2] == (
        "| Small, is_click AUC | 62.00 ± 1.41 | 63.00 ± 1.41 | 64.00 ± 1.41 | 65.00 ± 1.41 | 67.50 ± 0.71 (2x, 0.001) |"
    )
    assert made["search"].splitlines()[2:] == [
        "| Small | 1x | 61.00 | 65.00 | - |",
        "| Small | 2x | 60.00 | 66.00 | 64.00 |",
    ]
    # against lamb, the best baseline: 67 - 63 and 68 - 65, not table 2's own clippy (64 and 66)
    assert "| Small | lamb | +3.50 |" in made["significance"]
