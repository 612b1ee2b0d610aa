"""The HTML page of a run: its contents, its messages about missing data, and that a browser draws it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from browser import Balanced, opened
from ranker.errors import UserError
from ranker.reports.run_page import Recorded, render
from ranker.reports.run_page.page import RANKING_LOSSES
from ranker.reports.web.charts import Line, heat_map, line_chart
from ranker.reports.web.series import Series, thinned
from support import ROOT

TASKS = ("click", "watch_time")
ROLES = ("dcn", "bottom_first", "bottom_top", "head/click", "head/watch_time")
EVENTS: list[dict[str, Any]] = [
    {
        "kind": "micro",
        "step": 120,
        "task": "click",
        "depth": 6.0,
        "length": 30,
        "recovered_at": 150,
        "reason": "jumped",
    },
    {"kind": "shift", "step": 200, "task": "watch_time", "depth": 1.8, "length": 40, "reason": "<b>a new level</b>"},
    {"kind": "unsettled", "step": 300, "task": "click", "depth": 4.0, "length": 9, "reason": "training ended"},
    {"kind": "full", "step": 400, "task": "click", "depth": None, "length": 90, "reason": "never came back"},
    {"kind": "rollback", "step": 490, "to_step": 300, "try": 1, "cause": "full", "skipped_rows": 1024, "lr": 0.1},
]


def column(name: str, step: int) -> float:
    if name.endswith(("loss", "grad_norm")):
        return math.nan if 430 <= step < 440 else 2 + math.sin(step / 30) + (5e3 if 120 <= step < 150 else 0)
    if "sigma" in name:
        return min(1.0, 10 ** (-2 + step / 300))
    if "cosine" in name:
        return math.cos(step / 50)
    return math.inf if name.endswith("activation_max") and step == 400 else 0.5 + 0.3 * math.sin(step / 80)


def write_run(folder: Path, *, steps: int = 600, sparse: bool = False, finished: bool = True) -> Path:
    """A run folder with everything that can be in one, or with next to nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["train/loss", "lr", *(f"train/{t}/loss" for t in TASKS), "train/click/auc"]
    if not sparse:
        names += ["val/click/auc", "progressive/click/auc", "val/watch_time/rmse"]
        names += [
            f"sigma/{layer}.{part}" for layer in ("bottom.layers.0", "heads.click") for part in ("weight", "bias")
        ]
        signs = ("grad_norm", "sigma", "sigma_gc", "sigma_clippy", "dead_relus", "activation_max")
        names += [f"signs/{role}/{sign}" for role in ROLES for sign in signs]
        names += ["signs/task_norm/click", "signs/task_norm/watch_time", "signs/task_cosine/click/watch_time"]
        names += ["sharpness/hessian", "sharpness/preconditioned", "sharpness/ratio"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *names])
        for step in range(10, steps + 1, 10):
            rare = step % 50 == 0
            kept = [column(n, step) if rare or not n.startswith(("val", "sharp")) else "" for n in names]
            writer.writerow([step, *kept])
    (folder / "config.yaml").write_text("model: {name: large}\noptim: {name: clippy}\nlr_mult: 2.0\nseed: 3\n")
    if not sparse:
        (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in EVENTS) + '{"kind": "mic')
    if finished:
        metrics = {"test/click/auc": 0.66, "test/click/observed": 2048, "test/watch_time/rmse": None}
        summary = {"status": "diverged", "reason": "lost at <400>", "metrics": metrics, "steps": steps, "lr": 0.2}
        (folder / "summary.json").write_text(json.dumps(summary | {"lr_mult": 2.0}))
    return folder


def page_of(folder: Path) -> str:
    return render(Recorded.read(folder))


def test_a_full_run_shows_every_part_and_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "my <run>"))

    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == []
    assert "url(" not in page
    for title in (
        "click: log loss, nats per label",
        "click: AUC",
        "watch_time: RMSE",
        "sigma by tensor",
        "sharpness against 2 / lr",
    ):
        assert title in page, title
    for kind in ("micro", "full", "shift", "unsettled", "rollback"):
        assert f'line class="event {kind}"' in page
    assert "0.6600" in page
    assert "undefined" in page
    assert "my &lt;run&gt;" in page
    assert "<b>a new level" not in page, "text of a run is text, not markup"
    assert "missing" not in page.split("<main>")[1].split("<script>")[0]
    assert 'class="lost"' in page, "numbers that are not finite have a mark"


def test_what_was_not_recorded_says_how_to_record_it(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, sparse=True))
    assert page.count('<p class="missing">') == 4
    for advice in ("callbacks.early_signs.every=10", "callbacks.sharpness.every=100", "callbacks.divergence"):
        assert advice in page
    assert "click: log loss, nats per label" in page


def test_the_step_size_line_is_shown_without_early_signs_too(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    names = [f"signs/bottom.layers.0/{name}" for name in ("step_cut", "step_cut_grown")]
    rows = [f"{step},1.0,{300.0 if step == 30 else 1.0},0.1" for step in range(10, 60, 10)]
    (folder / "metrics.csv").write_text("\n".join([",".join(["step", "train/loss", *names]), *rows]) + "\n")
    page = page_of(folder)
    assert "by how much the last steps cut the step size" in page
    assert "bottom.layers.0" in page
    assert "No tensor has a sigma" not in page, "nothing is known about clipping"
    assert page.count("callbacks.early_signs.every=10") == 2, "of sigma and of the early signs"


def test_a_ranking_loss_has_its_chart_beside_the_log_loss(tmp_path: Path) -> None:
    names = {path.stem for path in (ROOT / "conf" / "loss").glob("*.yaml")} - {"pointwise"}
    assert names == set(RANKING_LOSSES)
    folder = write_run(tmp_path, steps=20)
    assert "loss inside groups" not in page_of(folder)
    header = "step,train/loss,train/click/loss,train/click/bpr"
    rows = [f"{step},1.3,0.6,{0.7 - step / 100}" for step in range(1, 21)]
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    assert "click: bpr loss inside groups" in page_of(folder)


def test_a_run_still_going_and_a_killed_one_are_told_apart(tmp_path: Path) -> None:
    folder = write_run(tmp_path, finished=False)
    assert 'class="status running"' in page_of(folder)
    for file in folder.iterdir():
        os.utime(file, (time.time() - 3600, time.time() - 3600))
    page = page_of(folder)
    assert 'class="status unfinished"' in page
    assert "60 minutes ago" in page
    (folder / "metrics.csv").unlink()
    assert "No losses yet" in page_of(folder)


def test_a_folder_without_a_run_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        Recorded.read(tmp_path)


def test_thinning_keeps_every_peak_and_what_is_not_finite() -> None:
    values = [0.0] * 10_000
    values[1234], values[4321], values[7777] = 9.0, -9.0, math.nan
    kept = thinned(Series(list(range(10_000)), values), 100)
    assert len(kept.steps) <= 300
    assert kept.steps == sorted(kept.steps)
    found = dict(zip(kept.steps, kept.values, strict=True))
    assert (found[1234], found[4321]) == (9.0, -9.0)
    assert math.isnan(found[7777])


def test_a_line_breaks_at_nan_and_scales_hold_one_point_and_constants() -> None:
    series = Series([1, 2, 3, 4], [1.0, math.nan, 1.0, 1.0])
    drawn = line_chart("t", [Line("a", series, "s0")], last_step=4)
    (path,) = re.findall(r'class="line s0" data-label="a" d="([^"]*)"', drawn)
    assert path.count("M") == 2
    assert "nan" not in path
    for lonely in ([5.0], [0.0], [math.inf], [-3.0]):
        drawn = line_chart("t", [Line("a", Series([7], lonely), "s0")], last_step=7)
        assert not re.search(r'="[^"]*(nan|inf)[^"]*"', drawn)


def test_a_cell_shows_the_smallest_of_its_steps_and_strength_grows_with_clipping() -> None:
    drawn = heat_map("t", {"w": Series([1, 2, 3], [1.0, 1e-3, math.nan])}, last_step=3)
    assert re.findall(r'<rect class="([^"]*)"', drawn) == ["hot h0", "hot h16", "unknown"]
    drawn = heat_map("t", {"w": Series([0, 1], [1.0, 0.1])}, last_step=100_000)
    assert re.findall(r'<rect class="([^"]*)"', drawn) == ["hot h5"]


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, steps=60_000))
    assert len(page) < 1_500_000


@pytest.mark.parametrize("sparse", [False, True])
def test_a_browser_draws_every_chart_without_an_error(tmp_path: Path, sparse: bool) -> None:
    folder = write_run(tmp_path / "run", sparse=sparse)
    (folder / "report.html").write_text(page_of(folder))
    seen = opened(folder / "report.html", tmp_path / "profile")

    assert seen.console == []
    charts = re.findall(r'<svg class="chart line".*?</svg>', seen.dom, re.DOTALL)
    assert f'data-charts="{len(charts)}"' in seen.dom, "the script ran to its end"
    assert len(charts) == (5 if sparse else 16)
    assert all(re.search(r'<path class="line[^>]*d="M[\d.]+,[\d.]+L', chart) for chart in charts)
    assert seen.dom.count('data-chart="heat"') == (0 if sparse else 2)
