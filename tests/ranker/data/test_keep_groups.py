"""``data.keep_groups``: rows of a group side by side in the batches, with the same batches for any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ranker.data.batch import NO_GROUP
from ranker.data.datamodule import RankingDataModule
from ranker.data.loader import WindowedLoader
from ranker.data.synthetic import SyntheticLog
from ranker.data.windows import permutation, plan_windows, share_of_groups
from ranker.errors import UserError

BATCH, WINDOW = 64, 256
LOG = SyntheticLog(train_rows=1000, eval_rows=10, num_users=40, num_items=40, signals=2)


def batches(*, keep_group="user", seed=3, **options):
    plan = plan_windows(LOG, window=WINDOW, batch_size=BATCH)
    return list(WindowedLoader(LOG, plan=plan, seed=seed, num_workers=0, keep_group=keep_group, **options))


def users(batch):
    return batch.groups_BG[:, 0].numpy()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_comes_once_in_the_same_batch_for_any_number_of_ranks(ranks):
    whole = batches()
    shares = [batches(rank=rank, world_size=ranks) for rank in range(ranks)]
    assert sorted(row for batch in whole for row in batch.row_B.tolist()) == list(range(1000))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [row for part in parts for row in part.row_B.tolist()] == batch.row_B.tolist()
        seen = [set(users(part)) for part in parts]
        assert sum(map(len, seen)) == len(set().union(*seen)), "a user is on two ranks"
        assert max(map(len, parts)) - min(map(len, parts)) < BATCH / 2


def test_only_the_border_of_a_batch_cuts_a_group():
    for window in range(4):
        inside = [batch for batch in batches() if batch.window == window]
        apart = Counter(user for batch in inside for user in set(users(batch)))
        assert sum(apart.values()) <= len(apart) + len(inside) - 1
        mixed = [batch for batch in batches(keep_group=None) if batch.window == window]
        assert sum(len(set(users(batch))) for batch in mixed) > 1.5 * sum(apart.values())


def test_neither_large_groups_nor_small_ones_come_first():
    keys = np.repeat([7, 8], [90, 10])
    first = [keys[permutation(seed=seed, window=0, rows=100, keys=keys)[0]] for seed in range(200)]
    assert 70 < first.count(8) < 130
    inside = permutation(seed=0, window=0, rows=100, keys=np.zeros(100, dtype=np.int64))
    assert sorted(inside) == list(range(100))
    assert list(inside) != sorted(inside)


def test_rows_without_a_key_are_groups_of_their_own():
    keys = np.where(np.arange(200) < 100, NO_GROUP, 5)
    order = permutation(seed=0, window=0, rows=200, keys=keys)
    place = np.flatnonzero(keys[order] == 5)
    assert place[-1] - place[0] == 99
    cuts = [share_of_groups(keys[order], rank=rank, world_size=2) for rank in range(2)]
    assert cuts[0][0] == 0
    assert cuts[0][1] == cuts[1][0]
    assert cuts[1][1] == 200
    assert share_of_groups(keys[:100], rank=0, world_size=2) == (0, 50)


def test_a_batch_of_one_group_is_on_one_rank():
    keys = np.zeros(10, dtype=np.int64)
    assert sorted(share_of_groups(keys, rank=rank, world_size=2) for rank in range(2)) == [(0, 10), (10, 10)]
    assert share_of_groups(keys[:0], rank=1, world_size=2) == (0, 0)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_run_resumes_and_knows_the_rows_of_its_batches(passes):
    data = RankingDataModule(LOG, batch_size=BATCH, window=WINDOW, seed=3, keep_groups="user", passes=passes)
    found = list(data.train_dataloader())
    for number in (0, 5, data.num_batches - 1):
        rows = {row for start, stop in data.row_ranges(number, number + 1) for row in range(start, stop)}
        assert rows == set(found[number].row_B.tolist())
    data.load_state_dict({"position": 9})
    assert [b.row_B.tolist() for b in data.train_dataloader()] == [b.row_B.tolist() for b in found[9:]]


def test_an_unknown_group_is_one_line():
    with pytest.raises(UserError, match=r"data.keep_groups: no group 'usr'; did you mean 'user'"):
        RankingDataModule(LOG, batch_size=BATCH, keep_groups="usr")
    with pytest.raises(UserError, match=r"data.keep_groups"):
        _ = RankingDataModule(lambda: LOG, batch_size=BATCH, keep_groups="usr").log
