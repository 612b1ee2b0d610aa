from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from ranker.training.bookkeeping import Bookkeeping, Timed


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


@pytest.mark.parametrize("skip", [2, 48, 1000])
def test_the_speed_is_measured_whatever_the_number_of_batches(
    fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, skip: int
) -> None:
    assert (Bookkeeping().examples_per_second(), Bookkeeping().data_wait_fraction()) == (0.0, 0.0)
    monkeypatch.setitem(Bookkeeping.__init__.__kwdefaults__, "skip_batches", skip)
    start = time.perf_counter()

    trainer = fit()

    books = next(callback for callback in trainer.callbacks if isinstance(callback, Bookkeeping))
    assert books.examples_per_second() > books.examples / (time.perf_counter() - start)
    assert 0 <= books.data_wait_fraction() < 1
