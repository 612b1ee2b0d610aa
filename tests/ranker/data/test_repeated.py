"""Several passes over a log: every row once a pass, in other orders, and never scored after it was trained on."""

from __future__ import annotations

import numpy as np
import pytest

from ranker.data.datamodule import RankingDataModule
from ranker.data.repeated import in_one_pass


def batches(log, *, passes: int, position: int = 0, window: int | str = 48):
    data = RankingDataModule(log, batch_size=16, window=window, seed=3, progressive=True, passes=passes)
    data.load_state_dict({"position": position})
    return data, list(data.train_dataloader())


@pytest.mark.parametrize("window", [48, "1h"])
def test_every_pass_has_every_row_once_in_an_order_of_its_own(array_log, window: int | str) -> None:
    log = array_log(100)
    data, found = batches(log, passes=3, window=window)
    each = data.num_batches // 3

    orders = [np.concatenate([b.row_B.numpy() for b in found[i * each : (i + 1) * each]]) for i in range(3)]
    assert all(sorted(order) == list(range(log.train_rows)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(
        orders[0], np.concatenate([b.row_B.numpy() for b in batches(log, passes=1, window=window)[1]])
    )
    assert [b.opening is not None for b in found[each:]] == [False] * 2 * each, "these rows are no longer unseen"
    assert any(b.opening is not None for b in found[:each])
    for number in range(data.num_batches):
        rows = {row for start, stop in data.row_ranges(number, number + 1) for row in range(start, stop)}
        assert rows == set(found[number].row_B.tolist())


def test_a_run_resumes_in_the_middle_of_a_later_pass(array_log) -> None:
    log = array_log(100)
    _, whole = batches(log, passes=2)
    _, rest = batches(log, passes=2, position=10)

    assert [b.row_B.tolist() for b in rest] == [b.row_B.tolist() for b in whole[10:]]


def test_ranges_across_the_border_of_two_passes_are_two() -> None:
    assert in_one_pass(np.array([[90, 110], [150, 160]]), 100).tolist() == [[90, 100], [0, 10], [50, 60]]
    assert in_one_pass(np.zeros((0, 2), dtype=np.int64), 100).shape == (0, 2)
