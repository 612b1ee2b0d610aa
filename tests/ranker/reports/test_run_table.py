"""Runs from W&B, with a fake of wandb 0.31's public API (apis/public/api.py and runs.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import wandb

from ranker.errors import UserError
from ranker.reports.comparison import comparison
from ranker.reports.run_table import load_tracked

PROJECT = "team/evenkeel"


@dataclass
class FakeRun:
    """The attributes of wandb.apis.public.Run that are read."""

    name: str
    state: str = "finished"
    summary_metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


class FakeRuns:
    """wandb.apis.public.Runs: asks when the first run is wanted; a project that is not there is a ValueError."""

    def __init__(self, project: str) -> None:
        self.project = project

    def __iter__(self) -> Iterator[FakeRun]:
        if self.project != PROJECT:
            raise ValueError(f"Could not find project {self.project.split('/')[1]}")
        yield FakeRun("one", summary_metrics=finished("clippy", 0, 0.66))
        yield FakeRun("two", summary_metrics=finished("clippy", 1, 0.68))
        yield FakeRun("lost", summary_metrics=finished("adagrad", 0, "NaN") | {"status": "diverged"})
        yield FakeRun("down", state="crashed", config=asked("adagrad", 1), summary_metrics={"train/loss": 0.4})
        yield FakeRun("going", state="running", config=asked("adagrad", 2))
        yield FakeRun("another program's", summary_metrics={"loss": 1.0}, config={"lr": 0.1})


class FakeApi:
    """wandb.Api."""

    def runs(self, path: str | None = None, *, lazy: bool = True) -> FakeRuns:
        assert not lazy, "summaries would be fetched one request a run"
        return FakeRuns(str(path))


def asked(optim: str, seed: int) -> dict[str, Any]:
    groups = {"data": "kuairand", "scale": "laptop", "model": "small", "optim": optim}
    return {group: {"name": name} for group, name in groups.items()} | {"lr_mult": 1.0, "seed": seed}


def finished(optim: str, seed: int, auc: float | str) -> dict[str, Any]:
    return {
        **{"status": "completed", "reason": "", "data": "kuairand", "scale": "laptop", "model": "small"},
        **{"optim": optim, "lr_mult": 1, "seed": seed, "lr": 0.4, "steps": 100, "config_hash": f"{optim}{seed}"},
        **{"examples_per_second": 1000.0, "data_wait_fraction": 0.0, "divergence/micro": 2, "parameters/dense": 20},
        **{"test/is_click/auc": auc, "train/loss": 0.5, "_step": 100},
    }


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "Api", FakeApi, raising=False)


@pytest.mark.usefixtures("logged_in")
def test_tracked_runs_give_the_table_that_run_folders_give() -> None:
    runs = load_tracked(PROJECT)

    assert runs["run"].to_list() == ["one", "two", "lost", "down"]
    assert runs["status"].to_list() == ["completed", "completed", "diverged", "failed"]
    assert runs["micro"].to_list() == [2, 2, 2, None]
    assert runs["reason"].to_list()[-1] == "W&B: crashed"
    assert math.isnan(runs["is_click/auc"][2])
    header, rows = comparison(runs, "is_click/auc")
    assert header == ["model", "lr", "adagrad", "clippy"]
    assert rows == [["small", "1x", "diverged 1 of 2; failed 1 of 2", "67.00 ± 1.41 (n=2)"]]


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("project", ["evenkeel", "team/", "team/nowhere"])
def test_a_wrong_project_is_said_in_one_line(project: str) -> None:
    with pytest.raises(UserError, match=r"entity/project|Could not find project nowhere"):
        load_tracked(project)


def test_nobody_logged_in_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(wandb.api), "api_key", property(lambda self: None))

    with pytest.raises(UserError, match="not logged in to W&B: run 'wandb login'"):
        load_tracked(PROJECT)
