from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from ranker.data.datamodule import RankingDataModule
from ranker.data.dense_statistics import NOTHING, DenseStatistics
from ranker.data.windows import permutation
from ranker.errors import UserError

ROWS, BATCH, WINDOW, SEED = 100, 8, 24, 3


def module(log, *, position=0, state=None, **options):
    settings = {"batch_size": BATCH, "window": WINDOW, "seed": SEED, "dense_statistics": "past_windows", **options}
    data = RankingDataModule(log, **settings)
    if state is not None:
        data.load_state_dict(state)
    return data


def changed(log, change):
    """The same log with dense values changed, given row numbers and values."""
    read = log.read

    def altered(start, stop):
        rows = read(start, stop)
        return replace(rows, dense_BF=change(rows.row_B[:, None], rows.dense_BF.clone()))

    log.read = altered
    return log


def train(data, batches=None):
    """Consumes batches as a trainer does. Returns the dense values of each."""
    got = []
    for batch in islice(data.train_dataloader(), batches):
        data.advance(batch)
        got.append(batch.dense_BF)
    return got


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def expected(position):
    """By NumPy over all earlier rows at once: row i holds the value i."""
    window, place = divmod(position, WINDOW // BATCH)
    start = window * WINDOW
    size = min(WINDOW, ROWS - start)
    rows = start + permutation(seed=SEED, window=window, rows=size)[place * BATCH : (place + 1) * BATCH]
    past = np.arange(start or size, dtype=np.float64)  # the first window by its own statistics
    return (rows - past.mean()) / past.std()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_normalised_with_earlier_windows_alone(array_log, workers):
    batches = train(module(array_log(ROWS), num_workers=workers))
    assert len(batches) == 13
    for position, dense_BF in enumerate(batches):
        np.testing.assert_allclose(dense_BF[:, 0].numpy(), expected(position), rtol=1e-6)


def test_two_samples_joined_by_hand():
    a = DenseStatistics(2, np.array([1.0]), np.array([2.0]))  # of 0 and 2
    b = DenseStatistics(1, np.array([7.0]), np.array([0.0]))
    both = a.joined(b)  # mean 3, squares 9 + 1 + 16
    assert (both.rows, both.mean_F.tolist(), both.squares_F.tolist()) == (3, [3.0], [26.0])
    assert NOTHING.joined(a) is a
    assert a.joined(NOTHING) is a


@pytest.mark.parametrize("row", [30, 71, 99, 102])
def test_a_later_row_changes_nothing_earlier(array_log, row):
    log = changed(array_log(ROWS), lambda number, x: torch.where(number == row, 1e6, x))
    before, after = train(module(array_log(ROWS))), train(module(log))
    window = row // WINDOW
    first = window * (WINDOW // BATCH)
    assert same(before[:first], after[:first])
    differing = sum(
        int((a != b).sum()) for a, b in zip(before[first : first + 3], after[first : first + 3], strict=True)
    )
    assert differing == (row < ROWS)  # within its own window, the row itself alone
    assert window >= 4 or not torch.equal(before[first + 3], after[first + 3])


def test_every_rank_and_every_number_of_workers_sees_the_same(array_log, monkeypatch):
    alone = train(module(array_log(ROWS)))
    assert same(alone, train(module(array_log(ROWS), num_workers=5)))
    ranks = []
    for rank in range(3):
        data = module(array_log(ROWS))
        monkeypatch.setattr(data, "_place", lambda rank=rank: (rank, 3))
        ranks.append(train(data))
    assert same(alone, [torch.cat(parts) for parts in zip(*ranks, strict=True)])


@pytest.mark.parametrize("position", [0, 1, 3, 5, 6, 12, 13])
def test_a_resumed_run_goes_on_with_the_same_statistics(array_log, position, tmp_path):
    whole = train(module(array_log(ROWS)))
    first = module(array_log(ROWS))
    train(first, position)
    torch.save(first.state_dict(), tmp_path / "state")
    log = array_log(ROWS)
    second = module(log, state=torch.load(tmp_path / "state", weights_only=True), num_workers=0)
    assert not log.reads, "restoring reads no rows"
    assert torch.equal(next(iter(first.val_dataloader())).dense_BF, next(iter(second.val_dataloader())).dense_BF)
    assert same(train(second), whole[position:])


@pytest.mark.parametrize(("trained", "past_rows"), [(2, 24), (3, 24), (4, 24), (13, 100)])
def test_evaluations_use_what_is_known_then(array_log, trained, past_rows):
    data = module(array_log(ROWS), eval_max_rows=4)
    loader = data.val_dataloader()
    raw = torch.arange(ROWS, ROWS + 5)[:, None].float()
    assert torch.equal(next(iter(loader)).dense_BF, raw)
    train(data, trained)
    past = np.arange(past_rows)
    wanted = (raw.numpy() - past.mean()) / past.std()
    np.testing.assert_allclose(next(iter(loader)).dense_BF.numpy(), wanted, rtol=1e-6)


def test_openings_are_normalised_as_their_window_is(array_log):
    batches = list(module(array_log(ROWS), progressive=True).train_dataloader())
    opening = batches[3].opening
    past = np.arange(24)
    np.testing.assert_allclose(opening.dense_BF[:, 0], (opening.row_B - past.mean()) / past.std(), rtol=1e-6)


def test_rows_that_are_not_trained_on_and_constant_features_do_no_harm(array_log):
    rows = array_log(ROWS).read(0, 6)
    silent = replace(rows, mask_BT=rows.row_B[:, None] < 4)
    assert DenseStatistics.of(silent).mean_F.tolist() == [1.5]
    assert DenseStatistics.of(replace(rows, mask_BT=rows.row_B[:, None] < 0)) is NOTHING
    constant = replace(rows, dense_BF=torch.full((6, 1), 3.0))
    assert DenseStatistics.of(constant).normalise(constant).dense_BF.tolist() == [[0.0]] * 6


def test_skipped_windows_are_no_past_and_going_back_finds_the_same_past(array_log):
    whole = train(module(array_log(ROWS)))
    data = module(array_log(ROWS))
    got = {}
    for batch in data.train_dataloader():
        got.setdefault(batch.number, batch.dense_BF)
        data.advance(batch)
        if batch.number == 4 and len(got) == 5:
            data.skip(4)  # from the middle of window 1 to window 3: of window 2 nothing was trained on
            assert data.known().rows == 48
        if batch.number == 12 and 5 not in got:
            data.skip(-8)
    assert not torch.equal(got[9], whole[9])
    assert same([got[i] for i in range(9)], whole[:9])


def test_a_window_that_was_only_fetched_ahead_is_no_past(array_log):
    data = module(array_log(ROWS))
    batches = iter(data.train_dataloader())
    for _ in range(6):
        data.advance(next(batches))
    assert next(batches).window == 2
    data.skip(3)  # window 3
    assert data.known().rows == 48


def test_going_back_behind_the_checkpoint_is_refused(array_log):
    first = module(array_log(ROWS))
    train(first, 7)
    second = module(array_log(ROWS), state=first.state_dict())
    second.skip(-5)
    with pytest.raises(UserError, match=r"cannot go back to window 0: the dense statistics .* begin at window 2"):
        train(second)


def test_a_checkpoint_of_the_other_kind_is_refused(array_log):
    with pytest.raises(UserError, match=r"written with data.dense_statistics=none"):
        module(array_log(ROWS), state={"position": 3})
    with pytest.raises(UserError, match=r"written with data.dense_statistics=past_windows"):
        module(array_log(ROWS), state=module(array_log(ROWS)).state_dict(), dense_statistics="none")
    with pytest.raises(UserError, match=r"data.dense_statistics 'past_window' is unknown"):
        module(array_log(ROWS), dense_statistics="past_window")


def test_without_statistics_nothing_moves(array_log):
    plain = train(module(array_log(ROWS), dense_statistics="none"))
    assert sorted(torch.cat(plain)[:, 0].tolist()) == list(range(ROWS))
