"""The picture of a mid-run loss: which run is shown, and the step size that is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ranker.paper import midrun_figure
from ranker.paper.jobs import DATA, Setting
from ranker.paper.midrun_figure import SPAN
from ranker.stability.step_cut import StepCut

SETTING = Setting(DATA["kuairand"])
NAIVE = ("model=small", "optim=adagrad", "lr_mult=1", "seed=2")
CLIPPY = ("model=small", "optim=clippy", "lr_mult=1", "seed=2")


def record(folder: Path, cuts: dict[int, tuple[float, float, float]], *, full: int | None = None) -> None:
    """80 steps with the cuts of three layers; a divergence at step 60."""
    lines = [
        "step,train/loss,val/is_click/auc,signs/a/step_cut,signs/b/step_cut,signs/c/step_cut,signs/a/step_cut_grown"
    ]
    for step in range(1, 81):
        loss = 9.0 if full and step == full + 2 else 1.0
        auc = {40: 0.7, 80: 0.5 if full else 0.72}.get(step, "")
        lines.append(",".join(map(str, (step, loss, auc, *cuts.get(step, (1.0, 1.0, 1.0)), 0.5))))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("train:\n  warmup_steps: 8\n")
    if full:
        (folder / "events.jsonl").write_text(f'{{"kind": "full", "step": {full}}}\n')


def test_the_step_size_is_the_product_of_the_median_cuts_of_spans_that_do_not_overlap(
    write_run: Any, tmp_path: Path
) -> None:
    early = ("model=small", "optim=adagrad", "lr_mult=1", "seed=0")
    record(write_run("early", list(early), status="diverged"), {}, full=5)
    # at step 60 a cut is seen too, but its span overlaps those that end at 49 and 73
    cuts = {25: (1.0, 2.0, 4.0), 60: (90.0, 90.0, 90.0), 73: (1.0, 100.0, 200.0)}
    record(write_run("late", list(NAIVE), status="diverged"), cuts, full=60)
    naive, missing = midrun_figure.read_lost(SETTING, tmp_path, [early, NAIVE])
    assert missing == []
    assert naive["seed"].unique().to_list() == [2], "the run whose AUC is known before it was lost, and fell"
    assert naive.drop_nulls("step_size").select("step", "step_size").rows() == [(25, 0.5), (49, 0.5), (73, 0.005)]
    assert midrun_figure.clippy_jobs(SETTING, naive)[0][-4:] == ("optim=clippy", *NAIVE[:1], "lr_mult=1", "seed=2")

    record(write_run("clippy", list(CLIPPY)), {})
    clippy, _ = midrun_figure.read_clippy(SETTING, tmp_path, [CLIPPY])
    found = {"midrun_naive": naive, "midrun_clippy": clippy}
    made = midrun_figure.midrun_sections(SETTING.data, found)["runs"]
    assert "| naive Adagrad | 9 | 70.00 | 50.00 | 0.5 | - | diverged |" in made
    assert "| Clippy | 1 | 70.00 | 72.00 | 1 | - | completed |" in made
    midrun_figure.draw_midrun(SETTING.data, found, tmp_path / "midrun")
    assert (tmp_path / "midrun.svg").stat().st_size > 1000


def test_a_run_that_was_lost_in_mid_run_is_preferred(
    write_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(midrun_figure, "LEFT", 15)
    jobs = [("model=small", "optim=adagrad", f"lr_mult={rate}", "seed=0") for rate in (0.8, 1, 2)]
    for name, job, full in zip(("start", "mid", "end"), jobs, (7, 42, 79), strict=True):
        folder = write_run(name, list(job), status="diverged")
        record(folder, {}, full=full)
        summary = json.loads((folder / "summary.json").read_text()) | {"steps": 80}
        (folder / "summary.json").write_text(json.dumps(summary))
    shown, _ = midrun_figure.read_lost(SETTING, tmp_path, jobs)
    assert shown["full_step"].unique().to_list() == [42]


def test_the_span_is_that_of_the_signal() -> None:
    assert StepCut.__init__.__kwdefaults__["span"] == SPAN


def test_it_says_so_where_no_candidate_was_lost(write_run: Any, tmp_path: Path) -> None:
    record(write_run("calm", list(NAIVE)), {})
    naive, _ = midrun_figure.read_lost(SETTING, tmp_path, [NAIVE])
    assert naive.height == 0
    assert midrun_figure.clippy_jobs(SETTING, naive) == []
    found = {"midrun_naive": naive, "midrun_clippy": naive}
    assert "No candidate" in midrun_figure.midrun_sections(SETTING.data, found)["runs"]
    midrun_figure.draw_midrun(SETTING.data, found, tmp_path / "midrun")
    assert not (tmp_path / "midrun.svg").exists()


def test_a_run_without_the_signal_has_no_step_size(write_run: Any, tmp_path: Path) -> None:
    folder = write_run("old", list(NAIVE), status="diverged")
    (folder / "metrics.csv").write_text("step,train/loss,val/is_click/auc\n1,2.0,\n2,3.0,0.6\n")
    (folder / "config.yaml").write_text("train:\n  warmup_steps: 0\n")
    (folder / "events.jsonl").write_text('{"kind": "full", "step": 2}\n')
    naive, _ = midrun_figure.read_lost(SETTING, tmp_path, [NAIVE])
    assert naive["step_size"].null_count() == 2
    assert naive["loss"].to_list() == pytest.approx([2.0, 3.0])
