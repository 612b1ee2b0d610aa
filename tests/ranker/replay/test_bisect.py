"""A bisection finds a planted step, feature and rows, and refuses batches without a divergence."""

from __future__ import annotations

import pytest

from ranker.errors import UserError
from ranker.replay.bisect import Bisection, Limits

from .conftest import ROWS, make_batch, planted

STEP, PLANTED, COLUMN, SNAPSHOT = 70, [3, 21, 40], 4, 60
LIMITS = Limits(lookback=3, horizon=8)


def bisection(engine, batches) -> Bisection:
    """A bisection of the batches after the snapshot of a run."""
    engine.run(range(1, SNAPSHOT + 1), batches[:SNAPSHOT])
    steps = range(SNAPSHOT + 1, len(batches) + 1)
    return Bisection(engine, engine.state(), steps, batches[SNAPSHOT:], limits=LIMITS)


def with_planted_rows():
    batches = [[make_batch(i)] for i in range(80)]
    batches[STEP - 1] = [planted(batches[STEP - 1][0], PLANTED, COLUMN)]
    return batches


def test_a_planted_batch_feature_and_rows_are_named(engine) -> None:
    search = bisection(engine(lr=0.1), with_planted_rows())

    found = search.run()

    assert found.event.step == found.step == STEP
    assert found.number == STEP - 1
    assert found.features.names == [f"x{COLUMN}"]
    assert found.rows is not None
    assert found.rows.row_ids == [(STEP - 1) * ROWS + row for row in PLANTED]
    assert found.replays <= search.max_replays()


def test_a_batch_that_only_has_a_high_loss_itself_is_told_from_one_that_harms_the_model(engine) -> None:
    spared = bisection(engine(lr=0.1), with_planted_rows()).run()  # Adagrad divides a huge gradient by itself
    harmed = bisection(engine("sgd", lr=0.02), with_planted_rows()).run()

    assert (spared.harm, harmed.harm) == (False, True)
    assert (spared.tasks, spared.layers) == (None, None)
    assert harmed.step == STEP
    assert harmed.features.names == [f"x{COLUMN}"]
    assert harmed.tasks is not None
    assert harmed.tasks.share["watch"] > 0.9  # a squared error
    assert harmed.tasks.needed == ["watch"]
    assert harmed.layers is not None
    assert max(harmed.layers.step, key=lambda name: harmed.layers.step[name]) == "bottom.layers.0"


def test_minutes_in_which_nothing_moves_are_refused(engine) -> None:
    with pytest.raises(UserError, match="nothing to bisect"):
        bisection(engine(lr=0.1), [[make_batch(i)] for i in range(80)]).run()
