"""compare_runs.py prints the same cells in every format, and its page loads nothing."""

from __future__ import annotations

import csv
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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


def test_every_format_has_the_same_cells(compare: Callable[..., str]) -> None:
    metric = ("--metric", "is_click/auc")
    rows = [row for row in csv.reader(compare(RUNS, *metric, "--format", "csv").splitlines()) if row]
    markdown = compare(RUNS, *metric, "--format", "md").splitlines()

    assert rows[0] == ["model", "lr", "adagrad", "gc", "agc", "lamb", "clippy"]
    assert len(rows) == 11
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in (markdown[0], *markdown[2:12])] == rows


def test_the_page_lists_every_run_and_takes_nothing_from_the_net(compare: Callable[..., str], tmp_path: Path) -> None:
    written = compare(RUNS, "--html", "--out", str(tmp_path / "page.html"))
    page = Path(written.strip()).read_text()

    assert page.split('<section id="runs">')[1].count("<tr>") == 1 + 150
    assert "http" not in page
    assert "src=" not in page


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
