from __future__ import annotations

import time

from ranker.training.bookkeeping import Timed


def test_only_the_time_spent_waiting_for_items_is_counted() -> None:
    def slow():
        for item in range(3):
            time.sleep(0.02)
            yield item

    timed = Timed(slow())
    for _ in timed:
        time.sleep(0.05)

    assert 0.06 <= timed.waited < 0.12


def test_items_pass_through_unchanged() -> None:
    assert list(Timed([3, 1, 2])) == [3, 1, 2]
