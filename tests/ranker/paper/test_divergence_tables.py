"""Counts of diverged runs with their exact interval, and the largest stable learning rate."""

from __future__ import annotations

import polars as pl
import pytest

from ranker.paper.divergence_tables import largest_stable, table3_sections
from ranker.paper.jobs import DATA


def test_the_largest_stable_rate_lies_below_the_first_loss() -> None:
    tried = {1: ["completed"] * 2, 2: ["completed"] * 2, 4: ["completed", "diverged"], 8: ["completed"]}
    runs = pl.DataFrame([{"lr_mult": float(m), "status": s} for m, found in tried.items() for s in found])
    assert largest_stable(runs) == 2
    assert largest_stable(runs.filter(pl.col("lr_mult") == 4)) is None


# The interval in closed form: 1 - 0.025^(1/n) for none of n, sqrt(0.975) for 1 of 2; 3 of 10 as in published tables.
@pytest.mark.parametrize(
    ("lost", "n", "interval"),
    [(0, 10, "0 to 31 %"), (10, 10, "69 to 100 %"), (1, 2, "1 to 99 %"), (3, 10, "7 to 65 %")],
)
def test_table_3_counts_the_lost_runs_with_an_exact_interval(lost: int, n: int, interval: str) -> None:
    rows = [{"model": "large_dcn", "status": "diverged", "is_click/auc": 0.5, "full_step": 30 + i} for i in range(lost)]
    rows += [{"model": "large_dcn", "status": "completed", "is_click/auc": 0.75, "full_step": None}] * (n - lost)
    made = table3_sections(DATA["kuairand"], {"table3": pl.DataFrame(rows, infer_schema_length=None)})["at-0.4x"]
    auc = f"75.00 ± 0.00 (n={n - lost})" if n - lost > 1 else "75.00 (n=1)" if n > lost else "-"
    step = f"{30 + (lost - 1) / 2:g}" if lost else "-"
    assert made.splitlines()[2] == f"| Large+DCN | {lost} of {n} | {interval} | {step} | {auc} | 5 of 5 |"
    counted = pl.DataFrame([*rows, {**rows[0], "status": "unsettled"}], infer_schema_length=None)
    made = table3_sections(DATA["kuairand"], {"table3": counted})["at-0.4x"]
    assert f"| {lost} of {n + 1}, 1 unsettled |" in made
