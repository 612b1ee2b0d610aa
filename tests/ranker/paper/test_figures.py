"""Figures from recorded curves: which runs are selected, their moments, and the files that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from ranker.paper import curve_figures, divergence_figures
from ranker.paper.jobs import DATA, Setting
from ranker.paper.store import curves

SETTING = Setting(DATA["kuairand"])


def record(folder: Path, losses: list[float], aucs: dict[int, float]) -> None:
    lines = ["step,train/loss,val/is_click/auc,signs/bottom_top/grad_norm,signs/bottom_top/sigma_clippy"]
    lines += [f"{s},{loss},{aucs.get(s, '')},{s}.5,{1 / s}" for s, loss in enumerate(losses, start=1)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def naive(rate: float) -> list[str]:
    return ["model=small", "optim=adagrad", f"lr_mult={rate}"]


def test_curves_keep_every_nth_step_and_every_evaluation(write_run: Any, tmp_path: Path) -> None:
    record(write_run("a", naive(1)), [3.0, 2.0, 1.0, 0.5, 0.25], {5: 0.6})
    names = {"loss": "train/loss", "auc": "val/is_click/auc", "other": "not/there"}
    found, missing = curves(tmp_path, [tuple(naive(1)), tuple(naive(2))], names, every=2)
    assert found.select("step", "loss", "auc", "other").rows() == [
        (2, 2.0, None, None),
        (4, 0.5, None, None),
        (5, 0.25, 0.6, None),
    ]
    assert missing == [tuple(naive(2))]


def lost(write_run: Any, name: str, overrides: list[str], *, first_step: int, losses: list[float]) -> None:
    folder = write_run(name, overrides, status="diverged")
    text = (folder / "summary.json").read_text().replace('"first_step": null', '"first_step": 1')  # a micro before it
    (folder / "summary.json").write_text(text)
    (folder / "events.jsonl").write_text(f'{{"kind": "micro", "step": 1}}\n{{"kind": "full", "step": {first_step}}}\n')
    record(folder, losses, {len(losses): 0.5})


def test_figure_4_takes_the_run_that_was_healthy_longest_and_finds_its_moments(write_run: Any, tmp_path: Path) -> None:
    late = [2.0] * 29 + [5.0, 300.0, 40.0] + [9.0] * 8
    lost(write_run, "early", naive(0.5), first_step=2, losses=[9.0] * 40)
    lost(write_run, "late", naive(4), first_step=30, losses=late)
    jobs = [tuple(naive(0.5)), tuple(naive(4))]
    run, _ = divergence_figures.read_signs(SETTING, tmp_path, jobs, roles=("bottom_top", "dcn"))
    assert run.drop_nulls("moment").select("moment", "step").rows() == [("a", 20), ("b", 30), ("c", 31)]
    assert "dcn/grad_norm" not in run.columns
    made = divergence_figures.sign_sections("fig4", SETTING.data, {"fig4": run})
    assert "| sign | a, step 20 | b, step 30 | c, step 31 |" in made["moments"]
    assert "| training loss | 2 | 5 | 300 |" in made["moments"]
    assert made["run"] == "Small, naive Adagrad at 4x, seed 0\n"


def test_figure_1_shows_the_completed_run_whose_loss_rose_furthest_beside_a_lost_one(
    write_run: Any, tmp_path: Path
) -> None:
    record(write_run("calm", naive(0.1)), [2.0, 1.5, 1.0], {3: 0.6})
    record(write_run("jumped", naive(0.2)), [2.0, 400.0, 1.0], {3: 0.61})
    lost(write_run, "lost", naive(1), first_step=2, losses=[2.0, 1e6, 3.0])
    both, _ = divergence_figures.read_losses(SETTING, tmp_path, [tuple(naive(rate)) for rate in (0.1, 0.2, 1.0)])
    assert both.group_by("kind", maintain_order=True).agg(pl.col("lr_mult").first()).rows() == [
        ("micro", 0.2),
        ("full", 1.0),
    ]
    made = divergence_figures.loss_sections(SETTING.data, {"fig1": both})
    assert (
        "| micro | Small, naive Adagrad at 0.2x, seed 0 | 2 | 400 at step 2 | 1 | 61.00 | completed |" in made["runs"]
    )
    divergence_figures.draw_losses(SETTING.data, {"fig1": both}, tmp_path / "fig1")
    assert (tmp_path / "fig1.svg").stat().st_size > 1000


def test_figure_6_tells_the_median_sigma_early_and_late() -> None:
    sigma = [0.1, 0.1, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0]
    curve = pl.DataFrame({"step": range(1, 9), "dcn": sigma, "bottom_top": None, "model": "large_dcn", "lr_mult": 2.0})
    made = curve_figures.sigma_sections(SETTING.data, {"fig6": curve})
    assert made["sigma"].splitlines()[2:] == ["| dcn | 0.1 | 0.5 | 75 % |"]


def test_figure_4_says_so_where_no_candidate_was_lost(write_run: Any, tmp_path: Path) -> None:
    record(write_run("calm", naive(0.1)), [2.0, 1.5, 1.0], {3: 0.6})
    run, missing = divergence_figures.read_signs(SETTING, tmp_path, [tuple(naive(0.1))], roles=("bottom_top",))
    assert (run.height, missing) == (0, [])
    assert "No candidate" in divergence_figures.sign_sections("fig4", SETTING.data, {"fig4": run})["moments"]
    divergence_figures.draw_signs("fig4", SETTING.data, {"fig4": run}, tmp_path / "fig4")
    assert not (tmp_path / "fig4.svg").exists()
