"""Windows in strips: each rank reads its own row groups, and the batches are those of any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from ranker.data.datamodule import RankingDataModule
from ranker.data.loader import EvalLoader, WindowedLoader
from ranker.data.parquet_log import ParquetLog
from ranker.data.windows import WindowPlan
from ranker.errors import UserError

GROUP, BATCH = 25, 40  # rows of a row group and of a batch
ROWS, HELD_OUT = 800, 200  # 32 row groups to train on and 8 for the hold-out


@pytest.fixture
def log(write_log):
    return ParquetLog(str(write_log({0: ROWS, 1: HELD_OUT}, row_group_size=GROUP)))


@pytest.fixture
def decoded(monkeypatch):
    """Fills up with the row groups that are decoded."""
    groups: list[int] = []
    decode = ParquetLog._decode
    monkeypatch.setattr(ParquetLog, "_decode", lambda log, group: (groups.append(group), decode(log, group))[1])
    return groups


def batches_of(log, *, strips, world_size=1, rank=0, window=400, **options):
    plan = WindowPlan(starts=np.arange(0, ROWS + 1, window), batch_size=BATCH, strips=strips)
    given = {"seed": 3, "rank": rank, "world_size": world_size, "num_workers": 0} | options
    return list(WindowedLoader(log, plan=plan, **given))


def test_each_rank_opens_its_share_of_the_row_groups(log, decoded):
    by_rank = []
    for rank in range(2):
        decoded.clear()
        batches_of(log, strips=4, world_size=2, rank=rank)
        by_rank.append(sorted(decoded))

    # Two windows of 16 row groups, of which each rank has the half.
    assert by_rank == [[*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]]
    decoded.clear()
    batches_of(log, strips=1, world_size=2)
    assert sorted(decoded) == list(range(32)), "without strips, each rank reads all"


@pytest.mark.parametrize("window", [400, 140, 50])  # whole row groups, a small last batch, fewer rows than two batches
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_any_number_of_ranks_draws_the_same_batches(log, world_size, window):
    alone = batches_of(log, strips=6, window=window)
    ranks = [batches_of(log, strips=6, window=window, world_size=world_size, rank=rank) for rank in range(world_size)]

    for number, batch in enumerate(alone):
        shares = [batches[number] for batches in ranks]
        assert [share.number for share in shares] == [number] * world_size
        assert [row for share in shares for row in share.row_B.tolist()] == batch.row_B.tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 6
    assert sorted(row for batch in alone for row in batch.row_B.tolist()) == list(range(ROWS // window * window))


@pytest.mark.parametrize("rows", [1000, 999, 65, 3])
def test_a_batch_has_the_same_share_of_each_strip_at_random(rows):
    def order(seed):
        return WindowPlan(starts=np.array([0, rows]), batch_size=64, strips=8).order(0, seed=seed)

    assert sorted(order(0)) == list(range(rows))
    bounds = rows * np.arange(9) // 8
    for start in range(0, rows, 64):
        batch = order(0)[start : start + 64]
        strips = np.searchsorted(bounds, batch, side="right") - 1
        assert abs(np.bincount(strips, minlength=8) - len(batch) * np.diff(bounds) / rows).max() < 2
        assert (np.diff(strips) >= 0).all(), "in the order of the strips"
    if rows == 1000:
        drawn = np.bincount(np.concatenate([order(seed)[:64] for seed in range(300)]), minlength=rows)
        assert drawn.sum() == 300 * 64
        assert abs(drawn - 19.2).max() < 6 * 19.2**0.5, "any row may be in the first batch"
        assert (order(1) != order(2)).any()
        later = WindowPlan(starts=np.array([0, rows]), batch_size=64, strips=8, windows_before=1).order(0, seed=0)
        assert (later != order(0)).any(), "each window has an order of its own"


def test_the_opening_of_a_window_is_scored_once_over_all_ranks(log):
    ranks = [batches_of(log, strips=4, world_size=2, rank=rank, opening=True) for rank in range(2)]

    openings = [batch.opening.row_B.tolist() for batches in ranks for batch in batches if batch.opening is not None]
    assert sorted(row for rows in openings for row in rows) == list(range(ROWS))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_rows", [None, 90])
def test_a_rank_evaluates_a_contiguous_part_of_the_hold_out(log, decoded, world_size, max_rows):
    seen, counts = [], []
    for rank in range(world_size):
        decoded.clear()
        options = {"max_rows": max_rows, "rank": rank, "world_size": world_size, "num_workers": 0}
        loader = EvalLoader(log, start=ROWS, stop=ROWS + HELD_OUT, batch_size=30, **options)
        batches = list(loader)
        seen += [row for batch in batches for row in batch.row_B.tolist()]
        counts.append((len(batches), len(loader)))
        assert len(set(decoded)) <= 8 / world_size + 2
    whole = EvalLoader(log, start=ROWS, stop=ROWS + HELD_OUT, batch_size=30, max_rows=max_rows)
    assert seen == [row for start, stop in whole.blocks for row in range(start, stop)]
    assert set(counts) == {(len(whole), len(whole))}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strips": 0}, r"data\.strips must be at least 1"),
        ({"strips": 1.5}, r"data\.strips must be a whole number"),
        ({"strips": 2, "dense_statistics": "past_windows"}, r"data\.dense_statistics=past_windows needs"),
        ({"strips": 11}, r"data\.strips=11 needs batches of 44 rows or more, scale\.batch_size is 40"),
        ({"strips": 2, "keep_groups": "user"}, r"data\.keep_groups needs"),
    ],
)
def test_what_needs_whole_windows_is_refused(log, options, said):
    with pytest.raises(UserError, match=said):
        RankingDataModule(log, batch_size=BATCH, **options)


def test_more_ranks_than_strips_are_refused(log, monkeypatch):
    data = RankingDataModule(log, batch_size=BATCH, strips=2)
    monkeypatch.setattr(RankingDataModule, "_place", lambda self: (0, 4))
    with pytest.raises(UserError, match=r"data\.strips=2 is less than the 4 ranks"):
        data.train_dataloader()
