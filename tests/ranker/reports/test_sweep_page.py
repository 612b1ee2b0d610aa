"""The page of many runs: what it shows, that its size is bounded, and that a browser draws and sorts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import polars as pl
import pytest

from browser import Balanced, opened
from made_sweep import write_sweep
from ranker.commands.report_commands import compare
from ranker.reports.run_table import load_runs, useless_tasks
from ranker.reports.sweep_page import render
from ranker.reports.sweep_page.groups import panels

METRICS = ("click/auc", "watch/rmse")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sweep(tmp_path_factory.mktemp("sweep"), optims=("adagrad", "gc", "clippy"), seeds=2, steps=400)
    spoil(folder / "gc_x1_seed0", **{"test/click/auc": 0.5, "test/click/ne": 1.01})
    return folder


def spoil(folder: Path, **metrics: float) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary["metrics"] |= metrics
    (folder / "summary.json").write_text(json.dumps(summary))


def page_of(folder: Path, metrics: tuple[str, ...] = METRICS) -> str:
    return render(load_runs(folder), metrics, title="t & u", folder=folder)


def part(page: str, key: str) -> str:
    return page.split(f'<section id="{key}">')[1].split("</section>")[0]


def test_the_command_writes_one_file_that_fetches_nothing_and_links_every_run(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare([str(sweep), "--html", "--metric", *METRICS]) == 0
    assert capsys.readouterr().out.strip() == str(sweep / "comparison.html")
    page = (sweep / "comparison.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "url(" not in page
    assert "http" not in page
    assert set(parser.fetched) == {f"{run.name}/report.html" for run in sweep.iterdir() if run.is_dir()}
    assert all((sweep / address).is_file() for address in parser.fetched)
    assert compare([str(sweep), "--html", "--out", str(sweep / "deep" / "page.html")]) == 0
    assert 'href="../clippy_x1_seed0/report.html"' in (sweep / "deep" / "page.html").read_text()


def test_lost_and_useless_runs_are_marked_in_every_part(sweep: Path) -> None:
    runs, page = load_runs(sweep), page_of(sweep)
    lost = runs.filter(status="diverged").height
    useless = sum(
        "click" in tasks for tasks, row in zip(useless_tasks(runs), runs["status"], strict=True) if row == "completed"
    )
    assert lost > 4
    assert useless == 2
    rates = part(page, "rates").split("<figure")[1]
    assert len(re.findall('class="dot ', rates)) == runs.height - lost - useless
    assert len(re.findall('class="hollow ', rates)) == useless
    lanes = re.findall(r">(\d) of 2</text>", rates)
    assert sum(map(int, lanes)) == lost
    curves = part(page, "curves").split("<h3>")[1]
    assert len(re.findall('class="cross', curves)) == lost
    assert len(re.findall('class="alone', curves)) == lost + useless
    assert f"<dt>diverged</dt><dd>{lost}</dd>" in page
    assert '<b class="useless">click</b>' in part(page, "runs")
    assert "t &amp; u" in page


def test_a_curve_is_the_median_of_its_sound_seeds_with_a_band(sweep: Path) -> None:
    (panel,) = panels(load_runs(sweep))
    assert [g.optim for g in panel.groups][:4] == ["adagrad"] * 4
    chart = part(page_of(sweep, ("click/auc",)), "curves").split("<h3>")[2].split("<figure")[1]
    assert "learning rate 0.25x" in chart
    low, high, start, stop = map(float, re.search(r'data-y="([^"]*),0"', chart).group(1).split(","))  # type: ignore[union-attr]
    path = re.search(r'class="line s2 g2 d0" data-label="clippy" d="M([^"]*)"', chart).group(1)  # type: ignore[union-attr]
    last = float(re.split("[L ]", path)[-1].split(",")[1])
    seen = low + (last - start) / (stop - start) * (high - low)
    finals = []
    for seed in (0, 1):
        table = pl.read_csv(sweep / f"clippy_x0.25_seed{seed}" / "metrics.csv")
        finals.append(100 * table["val/click/auc"].drop_nulls()[-1])
    assert seen == pytest.approx(sum(finals) / 2, abs=0.05)
    assert 'class="band s2 g2' in chart


def test_runs_from_a_table_have_no_curves_and_the_page_says_so(sweep: Path, tmp_path: Path) -> None:
    load_runs(sweep).drop("folder").write_csv(tmp_path / "runs.csv")
    page = render(pl.read_csv(tmp_path / "runs.csv"), METRICS, title="t", folder=tmp_path)
    assert "these runs come from a table" in page
    assert "<a href=" not in part(page, "rates")


def test_a_search_has_parallel_coordinates_with_the_better_end_marked(tmp_path: Path) -> None:
    write_sweep(tmp_path, optims=("clippy",), rates=(1.0, 2.0, 4.0), seeds=2, steps=100, settings=True)
    drawn = part(page_of(tmp_path), "settings")
    assert drawn.count("<figure") == 2
    for name in ("lambda_rel", "lambda_abs", "lr_mult"):
        assert f">{name}</text>" in drawn
    runs = load_runs(tmp_path)
    for figure, metric, best in zip(drawn.split("<figure")[1:], METRICS, (True, False), strict=True):
        top = runs.sort(metric, descending=best)["run"][0]
        assert re.search(rf'class="run p4" data-run="{top}"', figure), metric


def test_many_long_runs_make_a_page_of_bounded_size(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, optims=("gc",), rates=(1.0,), seeds=1, steps=5000)
    one = load_runs(folder)
    many = pl.concat([one.with_columns(seed=pl.lit(i), cell=pl.lit(f"c{i // 2}")) for i in range(400)])
    many = many.with_columns(run=pl.format("r{}", pl.col("seed")), folder=pl.lit(None, pl.String))
    assert len(render(many, ["click/auc"], title="t", folder=tmp_path)) < 700_000
    groups = pl.concat([one.with_columns(run=pl.format("g{}", i), cell=pl.lit(f"{i}")) for i in range(20)])
    assert len(render(groups, ["click/auc"], title="t", folder=tmp_path)) < 2_000_000


def test_a_run_whose_metrics_are_cut_off_is_drawn_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, optims=("gc",), rates=(1.0,), seeds=1, steps=200)
    path = folder / "gc_x1_seed0" / "metrics.csv"
    path.write_text(path.read_text()[:-25])
    assert "<figure" in part(page_of(tmp_path), "curves")
    path.write_text("")
    assert "no run folder has a metrics.csv" in part(page_of(tmp_path), "curves")


def test_a_browser_draws_sorts_filters_and_hides_without_an_error(sweep: Path, tmp_path: Path) -> None:
    options = ["--html", "--no-run-pages", "--out", str(tmp_path / "page.html")]
    assert compare([str(sweep), *options, "--metric", *METRICS]) == 0
    script = """
      const heads = [...document.querySelectorAll("#runs th")];
      const auc = heads.findIndex((head) => head.textContent === "click/auc, %");
      heads[auc].firstElementChild.click();
      heads[auc].firstElementChild.click();
      const first = document.querySelector("#runs tbody tr").cells[auc].textContent;
      const field = document.querySelector("label.search input");
      field.value = "adagrad diverged";
      field.dispatchEvent(new Event("input"));
      document.querySelector("[data-hides=g0]").click();
      document.body.dataset.first = first;
      document.body.dataset.left = document.querySelectorAll("#runs tbody tr:not([hidden])").length;
      document.body.dataset.shown = [...document.querySelectorAll("main .g0")].filter(
        (mark) => getComputedStyle(mark).display !== "none" && !mark.closest(".off")).length;
    """
    seen = opened(tmp_path / "page.html", tmp_path / "profile", script=script)
    assert seen.console == []
    runs = load_runs(sweep)
    told = dict(re.findall(r'data-(first|left|shown|charts)="([^"]*)"', seen.dom.split("<body")[1].split(">")[0]))
    assert float(told["first"]) == pytest.approx(100 * runs["click/auc"].max(), abs=0.006)  # type: ignore[operator]
    assert int(told["left"]) == runs.filter(optim="adagrad", status="diverged").height
    assert told["shown"] == "0"
    assert int(told["charts"]) == 12
