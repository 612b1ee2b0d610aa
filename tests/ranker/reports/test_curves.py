"""The figure of loss and AUC over training."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranker.errors import UserError
from ranker.reports.curves import COLOURS, Curve, plot_training, styles


def test_a_picture_is_drawn_from_metrics_csv(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/click/auc\n10,3.5,\n20,2.5,0.6\n")
    plot_training([Curve("clippy 1x", "clippy", 1.0, tmp_path)], "click", tmp_path / "curves.png", title="small")

    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_run_without_the_task_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n10,3.5\n")
    with pytest.raises(UserError, match="no column 'val/like/auc'"):
        plot_training([Curve("a", "clippy", 1.0, tmp_path)], "like", tmp_path / "curves.png", title="small")


def test_a_method_has_one_colour_and_a_rate_one_kind_of_line(tmp_path: Path) -> None:
    runs = [Curve("", optim, rate, tmp_path) for optim in ("clippy", "mine", "yours") for rate in (4.0, 1.0)]

    drawn = dict(zip([(run.optim, run.lr_mult) for run in runs], styles(runs), strict=True))

    assert {colour for (optim, _), (colour, _) in drawn.items() if optim == "clippy"} == {COLOURS["clippy"]}
    assert len({colour for colour, _ in drawn.values()}) == 3
    assert {rate: line for (_, rate), (_, line) in drawn.items()} == {1.0: "-", 4.0: "--"}
