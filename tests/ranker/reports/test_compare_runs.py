"""compare_runs.py prints the same cells in every format, and the HTML page loads nothing."""

from __future__ import annotations

import csv
import runpy
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ranker.reports.comparison import as_html
from support import ROOT

RUNS = str(Path(__file__).with_name("runs_without_warmup.csv"))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / "compare_runs.py"), run_name="__main__")
        if end.value.code:
            raise end.value
        return capsys.readouterr().out

    return call


class Tables(HTMLParser):
    """Cells of each table of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "meta":
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def test_every_format_has_the_same_cells(compare: Callable[..., str]) -> None:
    metric = ("--metric", "is_click/auc")
    rows = [row for row in csv.reader(compare(RUNS, *metric, "--format", "csv").splitlines()) if row]
    page = Tables(compare(RUNS, *metric, "--format", "html"))
    markdown = compare(RUNS, *metric, "--format", "md").splitlines()

    assert rows[0] == ["model", "lr", "adagrad", "gc", "agc", "lamb", "clippy"]
    assert len(rows) == 11
    assert page.tables[0] == rows
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in (markdown[0], *markdown[2:12])] == rows


def test_the_page_lists_every_run_and_takes_nothing_from_the_net(compare: Callable[..., str]) -> None:
    page = compare(RUNS, "--format", "html")

    assert len(Tables(page).tables[1]) == 1 + 150
    assert "http" not in page
    assert "src=" not in page


def test_what_runs_say_is_no_markup() -> None:
    page = as_html([("a < b", ["<i>"], [["<script>alert(1)</script>"]])], title="x & y")

    assert Tables(page).tables == [[["<i>"], ["<script>alert(1)</script>"]]]
    assert "x &amp; y" in page


def test_an_unknown_metric_is_answered_with_near_names(
    compare: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        compare(RUNS, "--metric", "click/auc")
    assert end.value.code == 2
    assert "did you mean 'is_click/auc'" in capsys.readouterr().err


def test_without_runs_the_script_says_what_it_wants(
    compare: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare()

    assert "give run folders, CSV files or --wandb ENTITY/PROJECT" in capsys.readouterr().err
