"""Comparison tables from run folders."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from ranker.errors import UserError
from ranker.reports.comparison import as_csv, as_markdown, caption, comparison
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


def test_completed_runs_that_are_no_better_than_a_constant_are_marked(sweep: Path, tmp_path: Path) -> None:
    for seed, metrics in enumerate(
        (
            {"test/is_click/auc": 0.66, "test/is_click/ne": 1.01, "test/watch/rmse": 1.2, "test/watch/r2": 0.1},
            {"test/is_click/auc": 0.66, "test/is_click/ne": 0.9, "test/watch/rmse": 1.6, "test/watch/r2": -0.1},
            {"test/is_click/auc": 0.5, "test/is_click/ne": 0.999, "test/watch/rmse": 1.2, "test/watch/r2": None},
        )
    ):
        folder = tmp_path / f"gc{seed}"
        write_run(folder, "gc", seed, None)
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"metrics": metrics}))
    runs = load_runs(sweep)

    cells = {metric: comparison(runs, metric)[1][0][3] for metric in ("is_click/auc", "watch/rmse")}
    assert cells["is_click/auc"] == "no better than a constant 2 of 3; 60.67 ± 9.24 (n=3)"
    assert cells["watch/rmse"] == "no better than a constant 1 of 3; 1.3333 ± 0.2309 (n=3)"


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


def write_config(folder: Path, seed: int, **optim: float) -> None:
    content = {
        "seed": seed,
        "optim": {"name": "clippy", **optim},
        "train": {"log_every": seed + 1},
        "tags": [str(seed)],
    }
    (folder / "config.yaml").write_text(json.dumps(content))


def test_runs_that_differ_in_more_than_the_seed_are_rows_of_their_own_and_say_in_what(tmp_path: Path) -> None:
    runs_of = [(0, 0.01, 0.70), (1, 0.01, 0.72), (0, 1e-5, 0.6), (1, 1e-5, 0.62)]
    for number, (seed, lambda_abs, auc) in enumerate(runs_of):
        write_run(tmp_path / str(number), "clippy", seed, auc)
        write_config(tmp_path / str(number), seed, lambda_abs=lambda_abs, eps=1e-10)

    runs = load_runs(tmp_path)

    header, rows = comparison(runs, "is_click/auc")
    assert header == ["model", "lr", "optim.lambda_abs", "clippy"]
    assert rows == [["small", "1x", "0.01", "71.00 ± 1.41 (n=2)"], ["small", "1x", "1e-05", "61.00 ± 1.41 (n=2)"]]
    runs.write_csv(tmp_path / "saved.csv")
    assert comparison(pl.read_csv(tmp_path / "saved.csv"), "is_click/auc")[1] == [[*rows[0]], [*rows[1]]]
    hashes = comparison(runs.drop("optim.lambda_abs"), "is_click/auc")
    assert hashes[0] == ["model", "lr", "cell", "clippy"], "what differs is not known: still no mean over both"
    assert sorted(row[-1] for row in hashes[1]) == ["61.00 ± 1.41 (n=2)", "71.00 ± 1.41 (n=2)"]


def test_an_interrupted_run_is_no_failed_one_and_an_auc_has_one_unit(sweep: Path) -> None:
    write_run(sweep / "5", "clippy", 2, None, status="failed", reason="interrupted at step 5; go on with: ...")
    runs = load_runs(sweep)

    assert comparison(runs, "is_click/auc")[1][0][-1] == "interrupted 1 of 3; 67.00 ± 1.41 (n=2)"
    assert caption("is_click/auc") == "is_click/auc, %"
