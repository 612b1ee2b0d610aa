from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from ranker.errors import UserError
from ranker.training.metrics_csv import MetricsCsv
from ranker.training.row_thinning import Thinning

THINNING = Thinning(keep_steps=1_000, stretches=32)
SPIKE, LOST = 777, 1_501  # steps of the highest loss, and of an event


def values(step: int) -> dict[str, float]:
    """What a run logs at a step: losses, now and then an evaluation or a measurement, and an event."""
    row = {"train/loss": 1000.0 if step == SPIKE else 1.0 + (step * 37 % 101) / 100}
    if step % 50 == 0:
        row["val/click/auc"] = step / 1e6
    if step % 70 == 3:
        row["signs/bottom/grad_norm"] = float(step)
    if step == LOST + 40:
        row["divergence/micro"] = float(LOST)
    return row


def trained(path: Path, steps: range, *, flush_every: int, resumed_at: int | None = None) -> MetricsCsv:
    log = MetricsCsv(path / "metrics.csv", THINNING)
    if resumed_at is not None:
        log.resume(resumed_at)
    for step in steps:
        log.log_metrics(values(step), step=step)
        if step % flush_every == 0:
            log.save()
    return log


def rows(log: MetricsCsv) -> Iterator[tuple[int, dict[str, float]]]:
    with log.path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield int(row.pop("step")), {name: float(value) for name, value in row.items() if value}


def test_old_rows_are_thinned_and_those_that_stay_have_all_their_values(tmp_path: Path) -> None:
    log = trained(tmp_path, range(1, 20_001), flush_every=97)
    log.finalize("success")

    found = dict(rows(log))
    assert all(row == values(step) for step, row in found.items())
    assert list(found) == sorted(found)
    assert set(range(19_001, 20_001)) <= found.keys(), "every row of the newest steps"
    assert {SPIKE, LOST, LOST + 40} <= found.keys(), "the peak, the first step of the event and its verdict"
    old = [step for step in found if step <= 19_000]
    assert len(old) < 1_000, "about 32 stretches of at most 4 rows per doubling, of which there are 4.3"
    for low in range(0, 19_000, 2_000):  # no part of the run is without its curves
        part = {name for step in old if low < step <= low + 2_000 for name in found[step]}
        assert {"train/loss", "val/click/auc", "signs/bottom/grad_norm"} <= part


@pytest.mark.parametrize("flush_every", [5, 100_000])
def test_the_rows_that_stay_do_not_depend_on_when_the_file_was_thinned(tmp_path: Path, flush_every: int) -> None:
    often = trained(tmp_path / "often", range(1, 6_001), flush_every=13)
    other = trained(tmp_path / "other", range(1, 6_001), flush_every=flush_every)
    for log in (often, other):
        log.finalize("success")

    assert often.path.read_bytes() == other.path.read_bytes()


@pytest.mark.parametrize("checkpoint", [2_950, 4_700])
def test_a_resumed_run_ends_with_the_rows_of_an_uninterrupted_one(tmp_path: Path, checkpoint: int) -> None:
    trained(tmp_path / "killed", range(1, 5_001), flush_every=100)  # no finalize: the process is killed
    again = trained(tmp_path / "killed", range(checkpoint + 1, 7_001), flush_every=100, resumed_at=checkpoint)
    whole = trained(tmp_path / "whole", range(1, 7_001), flush_every=100)
    for log in (again, whole):
        log.finalize("success")

    assert again.path.read_bytes() == whole.path.read_bytes()
    assert LOST in dict(rows(again)), "the events of the first attempt are known to the second"


def test_a_file_never_has_more_than_twice_the_rows_that_stay(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv", THINNING)
    most = 0
    for step in range(1, 20_001):
        log.log_metrics(values(step), step=step)
        if step % 100 == 0:
            log.save()
            most = max(most, log.path.read_bytes().count(b"\n") - 1)
    log.finalize("success")

    left = log.path.read_bytes().count(b"\n") - 1
    assert left < 2_200
    assert most < 2 * left + 200


def test_a_loss_that_is_no_number_counts_as_the_highest() -> None:
    losses = [{"step": step, "train/loss": loss} for step, loss in enumerate([1.0, math.nan, 2.0, 0.5])]
    assert [row["step"] for row in Thinning(4, 1).kept(losses, newest=1000, events=())] == [1, 3]


def test_every_row_is_kept_where_nothing_is_thinned(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv", Thinning(keep_steps=0))
    for step in range(5_000):
        log.log_metrics(values(step), step=step)
    log.finalize("success")
    assert len(list(rows(log))) == 5_000


@pytest.mark.parametrize(("keep_steps", "stretches"), [(-1, 1), (10, 0)])
def test_numbers_out_of_range_are_refused(keep_steps: int, stretches: int) -> None:
    with pytest.raises(UserError, match="keep_steps"):
        Thinning(keep_steps, stretches)
