"""Where 1x is: which rate is proposed, and why none is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from ranker.paper import calibration
from ranker.paper.calibration import RATES, calibration_jobs, judge, objections, proposal
from ranker.paper.jobs import DATA, Setting

SETTING = Setting(DATA["kuairand"])
METRIC = "is_click/auc"
Seen = tuple[str, float, int | None, float | None]  # status, AUC at the end, step, AUC before


def runs(by_rate: dict[float, list[Seen]], warmup: int = 100) -> pl.DataFrame:
    rows = [
        {"model": "small", "lr_mult": rate, "lr": 0.4 * rate, "status": status, METRIC: auc, "full_step": step}
        | {"auc_before": before, "warmup": warmup, "batch_size": 256, "seed": seed}
        for rate, seen in by_rate.items()
        for seed, (status, auc, step, before) in enumerate(seen)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def completed(auc: float) -> Seen:
    return ("completed", auc, None, None)


def lost(step: int, before: float) -> Seen:
    return ("diverged", 0.5, step, before)


TRAINS = {0.25: [completed(0.70), completed(0.71), completed(0.69)], 0.5: [completed(0.70)] * 2 + [lost(700, 0.69)]}


def test_1x_is_the_smallest_rate_that_loses_most_seeds_in_mid_run_and_trains_at_a_quarter() -> None:
    rates = judge(runs({**TRAINS, 1.0: [lost(400, 0.68), lost(500, 0.69), completed(0.66)]}), METRIC)
    assert [objections(rate, rates) != [] for rate in rates] == [True, True, False]
    told = proposal(rates)
    assert told.startswith("**1x is 0.4** (1 of the present 1x): naive Adagrad is lost in 2 of 3 seeds, at step 450")


def test_a_rate_that_kills_at_the_start_is_no_1x_and_the_start_is_named_as_the_cause() -> None:
    rates = judge(runs({**TRAINS, 1.0: [lost(3, 0.5), lost(7, 0.5), lost(449, 0.69)]}), METRIC)
    assert "within the warm-up of 100: the start" in objections(rates[-1], rates)[0]
    assert proposal(rates).startswith("**No 1x**: every rate that kills does so at the start, 0.4 at step")


def test_a_rate_that_kills_before_the_model_had_learned_is_no_1x() -> None:
    rates = judge(runs({**TRAINS, 1.0: [lost(140, 0.6), lost(150, 0.61), lost(449, 0.69)]}), METRIC)
    assert "after the warm-up but before the model had learned (0.660)" in objections(rates[-1], rates)[0]
    assert proposal(rates).startswith("**No 1x**: the smallest rate that loses most seeds is 0.4: lost at step 150")


def test_a_quarter_that_does_not_train_is_an_objection() -> None:
    mid_run = [lost(400, 0.69)] * 3
    poor = {0.125: [completed(0.70)] * 3, 0.25: [completed(0.60)] * 3, 1.0: mid_run}
    rates = judge(runs(poor), METRIC)
    assert objections(rates[-1], rates) == ["a quarter of it trains to 0.600 only, where the best is 0.700"]
    rates = judge(runs({0.125: [completed(0.70)] * 3, 0.25: [completed(0.7), *mid_run[1:]], 1.0: mid_run}), METRIC)
    assert objections(rates[-1], rates) == ["a quarter of it is lost too, in 2 of 3 seeds"]
    assert "the smallest rate that loses most seeds is 0.1: a quarter of it was not tried" in proposal(rates)


def test_it_says_so_where_nothing_is_lost_or_nothing_learned() -> None:
    assert "no rate up to 0.4 loses most seeds" in proposal(judge(runs({1.0: [completed(0.7)] * 3}), METRIC))
    rates = judge(runs({0.25: [completed(0.51)] * 3, 1.0: [lost(300, 0.51)] * 3}), METRIC)
    assert "learns next to nothing at any rate (AUC 0.510 at most)" in proposal(rates)


def test_the_test_day_is_never_read() -> None:
    jobs = calibration_jobs(SETTING)
    assert len(jobs) == 8 * len(RATES)
    assert all("data.days=[2022-04-25,2022-05-07]" in job and "optim=adagrad" in job for job in jobs)


def test_a_run_is_read_with_what_it_had_learned_before_it_was_lost(write_run: Any, tmp_path: Path) -> None:
    job = ("model=small", "optim=adagrad", "lr_mult=1")
    folder = write_run("lost", list(job), status="diverged", is_click__auc=0.5)
    (folder / "config.yaml").write_text("train:\n  warmup_steps: 20\n")
    lines = ["step,train/loss,val/is_click/auc", "40,1.0,0.61", "60,1.0,0.68", "80,1.1,0.6", "90,9.0,", "120,9.0,0.5"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    events = '{"kind": "micro", "step": 30}\n{"kind": "full", "step": 85}\n'
    (folder / "events.jsonl").write_text(events)
    found, _ = calibration.read(SETTING, tmp_path, [job])
    assert found.select("full_step", "warmup", "auc_before").rows() == [(85, 20, 0.68)]
    made = calibration.calibration_sections(SETTING.data, {"calibrate": found})["small"]
    assert "| 0.4 (1x) | 1 of 1 | 85 | 68.00 | - | at every rate at least one seed is lost" in made
