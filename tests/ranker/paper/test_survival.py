"""Survival curves: what is censored, and numbers done by hand."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ranker.errors import UserError
from ranker.paper import survival
from ranker.paper.jobs import DATA, Setting
from ranker.paper.survival import Times, kaplan_meier, log_rank, restricted_mean, times


def run(method: str, status: str, steps: int, **more: Any) -> dict[str, Any]:
    row = {"model": "small", "optim": method, "lr_mult": 1.0, "status": status, "steps": steps, "batch_size": 256}
    return row | {"run": "x", "first_step": None, "full_step": None, "unsettled_step": None, "is_click/auc": 0.7} | more


def test_a_lost_run_counts_at_its_full_divergence_and_others_are_censored() -> None:
    rows = [
        run("gc", "diverged", 450, first_step=20, full_step=400),  # after a micro divergence at step 20
        run("gc", "completed", 820),
        run("gc", "unsettled", 820, first_step=20, unsettled_step=800),
    ]
    assert times(pl.DataFrame(rows)) == Times([400, 820, 800], [True, False, False])
    with pytest.raises(ValueError, match="run x diverged"):
        times(pl.DataFrame([run("gc", "diverged", 450)]))


def test_median_and_restricted_mean_by_hand() -> None:
    # S = 1 to step 2, 3/4 to 4, 1/2 to 6, then 1/4: the area up to 8 is 2 + 1.5 + 1 + 0.5
    found = Times([2, 4, 6, 8], [True, True, True, False])
    assert kaplan_meier(found).median_survival_time_ == 4
    assert restricted_mean(found, 8) == pytest.approx(5.0)
    # one run censored at 3 leaves two at risk from step 4 on: S = 3/4, 3/8, 0
    assert restricted_mean(Times([2, 3, 4, 6], [True, False, True, True]), 8) == pytest.approx(2 + 1.5 + 0.75)


def test_the_log_rank_test_by_hand_and_nothing_to_compare() -> None:
    # Two groups of one: at the first event O = 1, E = 1/2, V = 1/4; the last one has only one run at risk. chi2 = 1.
    assert log_rank(Times([1], [True]), Times([2], [True])) == pytest.approx(0.3173, abs=1e-4)
    assert log_rank(Times([5, 5], [False] * 2), Times([5], [False])) is None


def found() -> dict[str, pl.DataFrame]:
    rows = [run("adagrad", "diverged", 50 + s, full_step=40 + s) for s in range(3)]
    rows += [run("gc", "completed", 100) for _ in range(3)]
    rows += [run("clippy", "completed", 100), run("clippy", "unsettled", 100, unsettled_step=90)]
    return {"survival": pl.DataFrame(rows, infer_schema_length=None)}


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    made = survival.survival_sections(DATA["kuairand"], found())["small"]
    lines = made.splitlines()
    assert lines[2].startswith("| 1x | adagrad | 3 of 3 | - | 10,496 | 10,496 |  | 0.0")  # 41 steps of 256 rows
    assert lines[3].startswith("| 1x | gc | 0 of 3 | 70.00 ± 0.00 | more than 25,600 | 25,600 | 0.0")
    assert "| 1x | clippy | 0 of 2 | 70.00 | more than 25,600 |" in made
    assert lines[4].endswith("| - |"), "neither gc nor clippy lost a run"
    survival.draw_survival(DATA["kuairand"], found(), tmp_path / "survival")
    assert (tmp_path / "survival.svg").stat().st_size > 1000


def test_jobs_are_every_method_at_every_rate() -> None:
    assert len(survival.survival_jobs(Setting(DATA["kuairand"], seeds=2))) == 5 * 4 * 2


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def no_lifelines(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lifelines"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_lifelines)
    with pytest.raises(UserError, match=r"survival curves need lifelines; run pip install -e '\.\[report\]'"):
        kaplan_meier(Times([1], [True]))
