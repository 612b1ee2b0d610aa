"""Reading run folders into rows, and matching runs with jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ranker.errors import UserError
from ranker.paper.store import collect, identity, matching, read_runs


def test_jobs_are_the_same_whatever_the_order_the_way_of_writing_and_the_machine() -> None:
    first = (
        "data=kuairand",
        "lr_mult=2",
        "optim.clip_norm=0.01",
        "train.progressive=false",
        "logger=none",
        "data.source=/a",
    )
    second = (
        "train.progressive=False",
        "data.source=/b",
        "optim.clip_norm=1e-2",
        "data=kuairand",
        "lr_mult=2.0",
        "seed=0",
    )
    assert identity(first) == identity(second)
    assert identity(first) != identity((*first, "seed=1"))
    for unrecorded in ("callbacks.capsules.max_capsules=1", "callbacks.early_signs.every=1", "data.root=/elsewhere"):
        assert identity(first) == identity((*first, unrecorded)), unrecorded
    for recorded in ("model.widths.large.laptop=[8]", "callbacks.rollback.tries=1", "callbacks.divergence.stop=false"):
        assert identity(first) != identity((*first, recorded)), recorded
    old, new = ("${scale.model.small.hidden}", "'${model.widths.small.${scale.name}}'")
    assert identity((f"model.net.hidden={old}",)) == identity((f"model.net.hidden={new}",))


def test_runs_come_in_the_order_of_their_jobs_and_missing_ones_are_named(write_run: Any, tmp_path: Path) -> None:
    one, two, three = (("model=small", f"seed={s}", "optim.clip_norm=0.1") for s in range(3))
    write_run("a", list(two), click__auc=0.7123456789, click__observed=9.0)
    write_run("b", list(one), status="diverged", click__auc=0.5)
    write_run("c", list(three), status="failed")
    write_run("d", ["model=large"])
    runs, missing = collect(tmp_path / "sweep", [one, two, three])
    assert runs["run"].to_list() == ["b", "a"]
    assert runs["status"].to_list() == ["diverged", "completed"]
    assert runs["click/auc"].to_list() == [0.5, 0.712346]
    assert runs["optim.clip_norm"].to_list() == [0.1, 0.1]
    assert "click/observed" not in runs.columns
    assert missing == [three]


def test_a_run_that_ended_during_a_divergence_is_unsettled(write_run: Any, tmp_path: Path) -> None:
    job = ("model=small", "seed=0")
    folder = write_run("a", list(job), click__auc=0.7)
    text = (folder / "summary.json").read_text().replace('"micro": 0', '"micro": 0, "unsettled": 1')
    (folder / "summary.json").write_text(text)
    (folder / "events.jsonl").write_text('{"kind": "micro", "step": 2}\n{"kind": "unsettled", "step": 9}\n')
    runs, _ = collect(tmp_path, [job])
    assert runs.select("status", "full_step", "unsettled_step").rows() == [("unsettled", None, 9)]


def test_matching_asks_for_what_was_said_and_for_nothing_else(write_run: Any, tmp_path: Path) -> None:
    jobs = [("model=small", "seed=0"), ("model=small", "data.window=1024"), ("model=small", "train.warmup_steps=20")]
    for i, job in enumerate(jobs):
        write_run(str(i), list(job))
    runs, _ = collect(tmp_path / "sweep", jobs)
    among = ("model", "data.window", "train.warmup_steps", "never.said")
    assert matching(runs, ("model=small",), among)["run"].to_list() == ["0"]
    assert matching(runs, ("model=small", "data.window=1024"), among)["run"].to_list() == ["1"]
    assert matching(runs, ("model=small", "never.said=1"), among).is_empty()


def test_a_missing_csv_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reproduce\.py"):
        read_runs(tmp_path / "none.csv")


def test_a_phase_without_runs_is_read_as_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "table2_refine.csv"
    path.write_text(pl.DataFrame().write_csv())
    assert read_runs(path).height == 0
