"""Comparison tables from run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranker.errors import UserError
from ranker.reports.comparison import as_csv, as_markdown, comparison
from ranker.reports.run_table import by_cell, load_runs


def write_run(
    folder: Path,
    optim: str,
    seed: int,
    auc: float | None,
    *,
    lr_mult: float = 1.0,
    status: str = "completed",
    **more: str,
) -> None:
    folder.mkdir(parents=True)
    summary = {
        **more,
        "status": status,
        "model": "small",
        "optim": optim,
        "data": "kuairand",
        "scale": "laptop",
        "lr": 0.2,
        "lr_mult": lr_mult,
        "seed": seed,
        "steps": 100,
        "examples_per_second": 1000.0,
        "data_wait_fraction": 0.01,
        "metrics": {"test/is_click/auc": auc},
        "divergence": {"micro": 0, "full": status == "diverged", "first_step": None},
        "parameters": {"embedding": 10, "dense": 20},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_run(tmp_path / "0", "clippy", 0, 0.66)
    write_run(tmp_path / "1", "clippy", 1, 0.68)
    write_run(tmp_path / "2", "adagrad", 0, 0.5, status="diverged")
    write_run(tmp_path / "3", "adagrad", 1, 0.64)
    write_run(tmp_path / "4", "adagrad", 0, 0.5, lr_mult=2.0, status="diverged")
    return tmp_path


def test_a_cell_is_the_mean_and_deviation_of_the_seeds_that_completed(sweep: Path) -> None:
    cells = by_cell(load_runs(sweep), ["is_click/auc"]).filter(optim="clippy")

    assert cells["is_click/auc/mean"].item() == pytest.approx(0.67)
    assert cells["is_click/auc/std"].item() == pytest.approx(0.0141421, rel=1e-4)


def test_lost_runs_are_counted_and_not_averaged(sweep: Path) -> None:
    header, rows = comparison(load_runs(sweep), "is_click/auc")

    assert header == ["model", "lr", "adagrad", "clippy"]
    assert rows == [
        ["small", "1x", "diverged 1 of 2; 64.00 (n=1)", "67.00 ± 1.41 (n=2)"],
        ["small", "2x", "diverged 1 of 1", ""],
    ]


def test_runs_with_a_mitigation_are_rows_of_their_own(sweep: Path) -> None:
    write_run(sweep / "5", "adagrad", 0, 0.60, mitigation="warmup")
    runs = load_runs(sweep)

    header, rows = comparison(runs, "is_click/auc")

    assert header == ["model", "mitigation", "lr", "adagrad", "clippy"]
    assert rows == [
        ["small", "none", "1x", "diverged 1 of 2; 64.00 (n=1)", "67.00 ± 1.41 (n=2)"],
        ["small", "none", "2x", "diverged 1 of 1", ""],
        ["small", "warmup", "1x", "60.00 (n=1)", ""],
    ]
    older = runs.filter(mitigation="none").drop("mitigation")  # a CSV of before
    assert comparison(older, "is_click/auc")[0] == ["model", "lr", "adagrad", "clippy"]


def test_markdown_and_csv_hold_the_same_cells() -> None:
    header, rows = ["model", "clippy"], [["small", "66.00"]]

    assert as_markdown(header, rows) == "| model | clippy |\n| --- | --- |\n| small | 66.00 |\n"
    assert as_csv(header, rows) == "model,clippy\nsmall,66.00\n"


def test_an_unknown_metric_and_an_empty_folder_are_said(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run has the metric 'like/auc'; did you mean 'is_click/auc'"):
        comparison(load_runs(sweep), "like/auc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no summary\.json"):
        load_runs(tmp_path / "empty")
