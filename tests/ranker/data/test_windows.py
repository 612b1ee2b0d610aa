from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ranker.data.windows import WindowPlan, parse_window, permutation, plan_windows, share
from ranker.errors import UserError

HOUR_MS = 3_600_000


@pytest.mark.parametrize(
    ("window", "starts"), [(4, [0, 4, 8, 10]), (5, [0, 8, 10]), (100, [0, 10]), (1, [0, 4, 8, 10])]
)
def test_windows_of_rows_are_whole_batches_but_for_the_last(array_log, window, starts):
    plan = plan_windows(array_log(10), window=window, batch_size=4)
    assert plan.starts.tolist() == starts
    assert plan.num_batches == 3


def test_windows_of_hours_follow_the_clock_and_leave_out_empty_ones(array_log):
    minutes = np.array([5, 50, 55, 59, 60, 60, 125, 400, 401, 450])
    log = array_log(9, eval_rows=1, times_ms=minutes * 60_000)
    plan = plan_windows(log, window="1h", batch_size=2)
    assert plan.starts.tolist() == [0, 4, 6, 7, 9]
    assert [plan.batches(k) for k in range(plan.num_windows)] == [2, 1, 1, 1]
    assert plan_windows(log, window="0.5h", batch_size=2).starts.tolist() == [0, 1, 4, 6, 7, 9]


def test_a_batch_is_located_by_arithmetic(array_log):
    minutes = np.array([5, 50, 55, 59, 60, 60, 125, 400, 401, 450])
    plan = plan_windows(array_log(9, eval_rows=1, times_ms=minutes * 60_000), window="1h", batch_size=2)
    assert [plan.locate(batch) for batch in range(plan.num_batches)] == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]
    assert plan.rows(1) == (4, 6)


def test_a_log_without_training_rows_has_no_batch(array_log):
    for window in (7, "2h"):
        assert plan_windows(array_log(0), window=window, batch_size=4).num_batches == 0


@pytest.mark.parametrize("window", [0, -5, "", "h", "6", "6h", " 2 h ", "-1h", "0h", 1.5, None, True, "6d"])
def test_a_window_is_rows_or_hours(window):
    if window in ("6", "6h", " 2 h "):
        assert parse_window(window) == {"6": 6, "6h": 6.0, " 2 h ": 2.0}[window]
    else:
        with pytest.raises(UserError, match="6h; got"):
            parse_window(window)


def test_a_batch_size_of_zero_is_refused(array_log):
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        plan_windows(array_log(3), window=1, batch_size=0)


def test_a_permutation_holds_every_row_once_and_depends_on_seed_and_window():
    orders = [permutation(seed=s, window=w, rows=50) for s, w in [(0, 0), (0, 1), (1, 0), (-1, 0)]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert (permutation(seed=0, window=0, rows=50) == orders[0]).all()


def test_a_permutation_stays_the_same_over_versions():
    assert permutation(seed=7, window=3, rows=10).tolist() == [8, 4, 5, 3, 6, 0, 9, 7, 1, 2]


def test_shares_cover_the_rows_and_differ_by_one_at_most():
    for rows in range(9):
        for world_size in (1, 2, 3, 4):
            parts = [share(rows, rank=rank, world_size=world_size) for rank in range(world_size)]
            assert parts[0][0] == 0
            assert parts[-1][1] == rows
            assert all(a[1] == b[0] for a, b in pairwise(parts))
            sizes = [high - low for low, high in parts]
            assert max(sizes) - min(sizes) <= 1


def test_the_sizes_of_all_batches_add_up_to_the_rows() -> None:
    plan = WindowPlan(starts=np.array([0, 10, 13, 24]), batch_size=5)

    assert [plan.size(batch) for batch in range(plan.num_batches)] == [5, 5, 3, 5, 5, 1]
