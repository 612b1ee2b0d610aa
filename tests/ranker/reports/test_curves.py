"""The figure of loss and AUC over training."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranker.errors import UserError
from ranker.reports.curves import plot_training


def test_a_picture_is_drawn_from_metrics_csv(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/click/auc\n10,3.5,\n20,2.5,0.6\n")
    plot_training([("clippy 1x", "clippy", tmp_path)], "click", tmp_path / "curves.png", title="small")

    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_run_without_the_task_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n10,3.5\n")
    with pytest.raises(UserError, match="no column 'val/like/auc'"):
        plot_training([("a", "clippy", tmp_path)], "like", tmp_path / "curves.png", title="small")
