from __future__ import annotations

import threading
import time
from functools import partial
from itertools import count, islice

import pytest

from ranker.data.loader import Inline, in_order


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_the_order_of_the_tasks(workers):
    def task(i):
        time.sleep(0.002 * (i % 3 == 0))
        return i

    assert list(in_order((partial(task, i) for i in range(20)), workers=workers, depth=5)) == list(range(20))


@pytest.mark.parametrize(("workers", "depth", "most"), [(0, 5, 1), (1, 3, 3), (4, 6, 6)])
def test_no_more_than_depth_tasks_are_handed_out_ahead(workers, depth, most):
    handed_out = []

    def tasks():
        for i in count():
            handed_out.append(i)
            yield lambda i=i: i

    results = in_order(tasks(), workers=workers, depth=depth)
    for taken in range(1, 6):
        next(results)
        assert len(handed_out) <= taken - 1 + most
    results.close()


def test_closing_cancels_what_has_not_begun_and_waits_for_what_has():
    begun, finished, gate = [], [], threading.Event()

    def task(i):
        begun.append(i)
        if i:
            gate.wait(5)
        finished.append(i)

    results = in_order((partial(task, i) for i in count()), workers=1, depth=8)
    next(results)
    threading.Timer(0.05, gate.set).start()
    results.close()
    assert begun == finished
    assert len(begun) <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_comes_where_the_result_would_have(workers):
    def task(i):
        if i == 3:
            raise OSError("bad block")
        return i

    results = in_order((partial(task, i) for i in range(9)), workers=workers, depth=4)
    assert list(islice(results, 3)) == [0, 1, 2]
    with pytest.raises(OSError, match="bad block"):
        next(results)


def test_inline_runs_a_task_in_the_callers_thread():
    assert Inline().submit(threading.get_ident).result() == threading.get_ident()
