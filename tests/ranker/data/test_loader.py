from __future__ import annotations

import threading
import time
from functools import partial
from itertools import chain, count, islice

import pytest
import torch

from ranker.data.loader import EvalLoader, Inline, WindowedLoader, in_order
from ranker.data.windows import plan_windows

ROWS = 103
BATCH = 8


def loader(log, *, window=24, batch_size=BATCH, seed=3, **options):
    return WindowedLoader(log, plan=plan_windows(log, window=window, batch_size=batch_size), seed=seed, **options)


def rows_of(batches):
    return [batch.row_B.tolist() for batch in batches]


def flat(lists):
    return list(chain.from_iterable(lists))


def joined(per_rank):
    return [flat(parts) for parts in zip(*per_rank, strict=True)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [BATCH, 24, 40, 10_000])
def test_every_row_comes_exactly_once(array_log, workers, world_size, window):
    log = array_log(ROWS)
    ranks = [
        rows_of(loader(log, window=window, num_workers=workers, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(flat(flat(batches) for batches in ranks)) == list(range(ROWS))


@pytest.mark.parametrize("window", [BATCH, 24, 10_000, "0.01h"])
def test_the_order_is_the_same_for_any_number_of_workers_and_ranks(array_log, window):
    log = array_log(ROWS)
    alone = rows_of(loader(log, window=window, num_workers=0))
    for workers in (1, 2, 5):
        assert rows_of(loader(log, window=window, num_workers=workers)) == alone
    for world_size in (2, 3, 4, 16):
        ranks = [rows_of(loader(log, window=window, rank=r, world_size=world_size)) for r in range(world_size)]
        assert joined(ranks) == alone


def test_the_order_depends_on_the_seed(array_log):
    log = array_log(ROWS)
    assert rows_of(loader(log, seed=1)) != rows_of(loader(log, seed=2))


def test_each_window_has_an_order_of_its_own(array_log):
    batches = rows_of(loader(array_log(96), window=24))
    orders = {tuple(row % 24 for batch in batches[k : k + 3] for row in batch) for k in range(0, 12, 3)}
    assert len(orders) == 4


def test_a_window_of_one_batch_is_strict_order_between_batches(array_log):
    batches = rows_of(loader(array_log(ROWS), window=BATCH))
    assert [sorted(batch) for batch in batches] == [list(range(i, min(i + BATCH, ROWS))) for i in range(0, ROWS, BATCH)]


def test_batches_mix_the_rows_of_their_window_and_no_other(array_log):
    batches = list(loader(array_log(ROWS), window=24))
    assert [batch.window for batch in batches] == [i // 3 for i in range(13)]
    assert [batch.number for batch in batches] == list(range(13))
    for batch in batches:
        assert set((batch.row_B // 24).tolist()) == {batch.window}
    assert sorted(batches[0].row_B.tolist()) != list(range(BATCH))


def test_the_columns_of_a_row_stay_together(array_log):
    for batch in loader(array_log(ROWS)):
        assert torch.equal(batch.dense_BF[:, 0].long(), batch.row_B)
        assert torch.equal(batch.onehot_BC[:, 0], batch.row_B + 1)
        lengths = torch.diff(batch.ragged["tags"].offsets)
        assert torch.equal(lengths, batch.row_B % 3)
        assert torch.equal(batch.ragged["tags"].values, torch.repeat_interleave(batch.row_B, lengths))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [BATCH, 24, 10_000])
def test_a_run_goes_on_from_any_batch_with_the_same_batches(array_log, workers, window):
    log = array_log(ROWS)
    whole = rows_of(loader(log, window=window, num_workers=0))
    for start in range(len(whole) + 1):
        assert rows_of(loader(log, window=window, start_batch=start, num_workers=workers)) == whole[start:]


def test_going_on_reads_nothing_from_before_the_window(array_log):
    log = array_log(ROWS)
    list(loader(log, window=24, start_batch=7))
    assert min(start for start, _ in log.reads) == 48


def test_the_first_batch_of_a_window_carries_the_window_in_time_order(array_log):
    log = array_log(ROWS)
    for world_size in (1, 3):
        ranks = [list(loader(log, opening=True, rank=r, world_size=world_size)) for r in range(world_size)]
        for number, batches in enumerate(zip(*ranks, strict=True)):
            assert all((batch.opening is not None) == (number % 3 == 0) for batch in batches)
            if number % 3 == 0:
                rows = flat(batch.opening.row_B.tolist() for batch in batches)
                assert rows == list(range(number * BATCH, min((number + 3) * BATCH, ROWS)))
                assert all(batch.opening.window == batch.window for batch in batches)
    assert all(batch.opening is None for batch in loader(log))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_failed_read_reaches_the_consumer_after_the_good_batches(array_log, workers):
    log = array_log(ROWS)
    log.broken_from = 50
    got = []
    batches = iter(loader(log, num_workers=workers))
    with pytest.raises(OSError, match="bad block"):
        got.extend(batches)
    assert rows_of(got) == rows_of(loader(array_log(ROWS)))[:6]


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ranker-data")]


def test_leaving_early_ends_the_threads(array_log):
    for _ in loader(array_log(ROWS), num_workers=3):
        assert data_threads()
        break
    assert not data_threads()


def test_little_is_read_ahead(array_log):
    window = 2048 * BATCH  # some times the rows that one task cuts
    log = array_log(10 * window)
    iterator = iter(loader(log, window=window, num_workers=1))
    list(islice(iterator, 10))
    iterator.close()
    assert max(stop for _, stop in log.reads) <= 2 * window


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_running_loader_jumps(array_log, workers):
    log = array_log(ROWS)
    whole = rows_of(loader(log))
    got, jumping = [], loader(log, num_workers=workers)
    for batch in jumping:
        got.append(batch.row_B.tolist())
        if batch.number == 2 and len(got) == 3:
            jumping.seek(9)
        if batch.number == 10 and len(got) == 5:
            jumping.seek(1)
    assert got == [*whole[:3], *whole[9:11], *whole[1:]]


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_every_row_once_in_time_order(array_log, world_size, workers):
    log = array_log(10, eval_rows=21)
    loaders = [
        EvalLoader(log, start=10, stop=31, batch_size=6, rank=r, world_size=world_size, num_workers=workers)
        for r in range(world_size)
    ]
    ranks = [rows_of(each) for each in loaders]
    assert {len(each) for each in loaders} == {len(batches) for batches in ranks} == {4}
    assert [row for batches in ranks for row in flat(batches)] == list(range(10, 31))


def test_a_part_of_the_evaluation_is_spread_evenly(array_log):
    log = array_log(0, eval_rows=100)
    part = EvalLoader(log, start=0, stop=100, batch_size=10, max_rows=35)
    assert [rows[0] for rows in rows_of(part)] == [0, 30, 60]
    assert sum(map(len, rows_of(EvalLoader(log, start=0, stop=100, batch_size=10, max_rows=1)))) == 10
    assert sum(map(len, rows_of(EvalLoader(log, start=0, stop=100, batch_size=10, max_rows=1000)))) == 100


def test_kept_evaluation_rows_are_read_once(array_log):
    log = array_log(0, eval_rows=30)
    kept = EvalLoader(log, start=0, stop=30, batch_size=10, keep=True)
    assert rows_of(kept) == rows_of(kept)
    assert len(log.reads) == 3


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
