"""Real runs whose model is lost in mid-run, although the loss comes back: never ``completed``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import Finished, finished

LOST = (
    "model=small",
    "optim=adagrad",
    "optim.initial_accumulator_value=1e-6",
    "scale.batch_size=256",
    "data.log.train_rows=170000",
    "data.log.eval_rows=16384",
    "data.log.rows_per_day=26000",
    "data.log.difficulty.jump=30",
    "data.log.difficulty.quiet_days=0",
    "data.base_lr.laptop=0.4",
    "train.warmup_steps=800",
    "train.progressive=false",
    "lr_mult=4",
    "trainer=cpu",
    "train.threads=1",
    "logger=none",
)
# The losses jump at step 1,668 or 196, depending on the machine's arithmetic, and come back after 25 steps.
LARGE = (
    "experiment=paper_start",
    "train.head_bias=zero",
    "model=large_dcn",
    "optim=adagrad",
    "data.log.train_rows=2000000",
    "data.log.rows_per_day=200000",
    "train.warmup_steps=200",
    "train.progressive=false",
    "lr_mult=0.25",
    "trainer=cpu",
    "train.threads=1",
    "logger=none",
)


@pytest.fixture
def trained(command_line: Callable[..., None], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """Trains, and returns the summary and the last divergence."""

    def call(*overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
        folder = tmp_path / "run"
        command_line(f"hydra.run.dir={folder}", *overrides)
        done: Finished = finished(folder)
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        return done.summary, events[-1]

    return call


@pytest.mark.slow
def test_a_run_whose_auc_is_gone_is_never_completed(trained: Callable[..., Any]) -> None:
    summary, event = trained(*LOST)
    assert (summary["status"], event["kind"]) == ("diverged", "full")
    assert "the loss came back after" in event["reason"]
    assert "did not: 0." in event["reason"]


@pytest.mark.slow
def test_the_step_size_tells_within_20_steps_that_a_model_is_lost(trained: Callable[..., Any]) -> None:
    summary, event = trained(*LARGE)
    assert (summary["status"], event["kind"]) == ("diverged", "full")
    assert event["judged_at"] - event["step"] <= 20
    assert "step size of the median coordinate" in event["reason"]
