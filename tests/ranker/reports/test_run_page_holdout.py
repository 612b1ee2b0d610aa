"""The hold-out on a run's page: metrics in groups, confidence intervals, segments and reliability diagrams."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from ranker.reports.run_page import Recorded, render
from ranker.reports.run_page.holdout import metric_tables, reliability_diagrams, segment_tables

SUMMARY: dict[str, Any] = {
    "status": "completed",
    "reason": "",
    "metrics": {
        "test/click/auc": 0.7459,
        "test/click/observed": 2048,
        "test/click/gauc.user": 0.7123,
        "test/click/mrr.user": None,
        "test/watch/rmse": 1.5,
        "test/watch/xauc": 0.6,
    },
    "intervals": {"level": 0.9, "test/click/auc": [0.7412, 0.7503], "test/click/gauc.user": [None, None]},
    "tables": [
        {
            "task": "click",
            "name": "calibration",
            "columns": ["rows", "mean prediction", "mean label"],
            "rows": [[100, 0.1, 0.2], [100, 0.4, 0.3], [100, 0.5, None]],
        },
        {
            "task": "click",
            "name": "ne.tab",
            "columns": ["tab", "rows", "ne"],
            "rows": [["<b>home</b>", 1200, 0.91], ["search", 848, None]],
        },
    ],
}


def test_common_metrics_have_a_row_per_task_and_the_others_one_per_metric() -> None:
    (head, rows), (other_head, others) = metric_tables(SUMMARY)
    assert head == ("task", "auc", "observed", "rmse")
    assert rows[0][0] == "click"
    assert re.sub("<.*?>", "", rows[0][1]) == "0.7459 [0.7412, 0.7503]"
    assert rows[0][2:] == ["2,048", ""]
    assert other_head == ("metric", "click", "watch")
    assert others == [["gauc.user", "0.7123", ""], ["mrr.user", "undefined", ""], ["xauc", "", "0.6000"]]
    assert metric_tables({}) == []


def test_tables_of_segments_are_escaped_and_buckets_are_drawn() -> None:
    ((title, (head, rows)),) = segment_tables(SUMMARY)
    assert title == "ne.tab of click"
    assert head == ["tab", "rows", "ne"]
    assert rows == [["&lt;b&gt;home&lt;/b&gt;", "1,200", "0.9100"], ["search", "848", "undefined"]]
    (figure,) = reliability_diagrams(SUMMARY)
    dots = re.findall(r'<circle class="s0" cx="([\d.]+)" cy="([\d.]+)"', figure)
    assert len(dots) == 2  # the bucket without a label is left out
    (low_x, low_y), (high_x, high_y) = ([float(value) for value in dot] for dot in dots)
    assert low_x < high_x
    assert low_y > high_y  # pixels count downwards
    assert "100 rows: predicted 0.4, observed 0.3" in figure
    assert reliability_diagrams({}) == []


def test_the_page_shows_them_all(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "train/loss"], [1, 2.0]])
    page = render(Recorded.read(tmp_path))
    assert "In brackets: 90 % confidence intervals" in page
    assert page.count('data-chart="reliability"') == 1
    assert "<h3>ne.tab of click</h3>" in page
    assert "<b>home</b>" not in page
