"""Admission and eviction of ids, against a definition that keeps a record per row."""

from __future__ import annotations

import copy
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from optim import build_optimizer
from ranker.data.batch import Batch, Ragged
from ranker.data.schema import CategoricalFeature, Schema, Task
from ranker.errors import UserError
from ranker.models import SharedBottom, admission
from ranker.models.admission import INIT_RANGE, MINUTE_MS, admission_of, fresh_rows, observe
from ranker.models.embeddings import tables_made_by
from support import assert_equal

DAY_MS = 86_400_000
SCHEMA = Schema(
    name="ids",
    time_column="t",
    categorical=(
        CategoricalFeature(name="plain", num_embeddings=6, embedding_dim=4),
        CategoricalFeature(name="item", hash_buckets=12, embedding_dim=4, admit_after=3, evict_after_days=2),
        CategoricalFeature(name="user", hash_buckets=9, embedding_dim=2, admit_after=2),
        CategoricalFeature(name="shop", hash_buckets=5, embedding_dim=4, evict_after_days=1),
        CategoricalFeature(name="history", kind="sequence", table="item", embedding_dim=4),
        CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=4, embedding_dim=4),
    ),
    tasks=(Task(name="click"),),
)
SIZES = {"plain": 7, "item": 13, "user": 10, "shop": 6}
STARTS = {"plain": 0, "item": 7, "shop": 20, "user": 0}  # dim 4: plain, item, shop, tags; dim 2: user
WIDTH = {"plain": 4, "item": 4, "shop": 4, "user": 2}
RULES = {"item": (3, 2), "user": (2, 0), "shop": (0, 1)}


def batch(random, rows, day, window=0):
    ids = [torch.from_numpy(random.integers(0, SIZES[name], rows)) for name in ("plain", "item", "user", "shop")]

    def lists(size):
        lengths = random.integers(0, 4, rows)
        values = torch.from_numpy(random.integers(0, size, lengths.sum()))
        return Ragged(values, torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])))

    return Batch(
        dense_BF=torch.empty(rows, 0),
        onehot_BC=torch.stack(ids, dim=1),
        ragged={"history": lists(13), "tags": lists(5)},
        labels_BT=torch.from_numpy(random.integers(0, 2, (rows, 1))).float(),
        mask_BT=torch.ones(rows, 1, dtype=torch.bool),
        time_ms_B=torch.from_numpy(19_700 * DAY_MS + int(day * DAY_MS) + random.integers(0, 3_600_000, rows)),
        row_B=torch.arange(rows),
        window=window,
    )


def stream(seed=0, steps=30, rows=3):
    random = np.random.default_rng(seed)
    days = np.cumsum(random.choice([0.05, 1.5], steps, p=[0.5, 0.5]))
    return [batch(random, rows, day, window=number // 2) for number, day in enumerate(days)]


def made(method="adagrad"):
    torch.manual_seed(0)
    net = SharedBottom(SCHEMA, hidden=[8])
    return net, build_optimizer(method, net, lr=0.1)


def step(net, optimizer, parts):
    observe(net, optimizer, parts)
    logits, labels = (torch.cat([f(part) for part in parts]) for f in (net, lambda part: part.labels_BT))
    torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
    optimizer.step()
    optimizer.zero_grad()


class Record:
    """Counts and times by table and row, the slow way."""

    def __init__(self):
        self.count, self.last, self.evicted = Counter(), {}, Counter()
        self.clock = self.opened = 0
        self.window = -1

    def see(self, found):
        """Returns the rows to reset."""
        if found.window != self.window:
            self.window, self.opened = found.window, self.clock
        self.clock = max(self.clock, int(found.time_ms_B.max()) // MINUTE_MS)
        rows = Counter()
        for name, column in zip(("plain", "item", "user", "shop"), found.onehot_BC.T.tolist(), strict=True):
            rows.update((name, row) for row in column)
        rows.update(("item", row) for row in found.ragged["history"].values.tolist())
        reset = []
        for (name, row), times in rows.items():
            if name not in RULES or row == 0:
                continue
            patience = RULES[name][1] * 1440
            if patience and (name, row) in self.last and self.last[name, row] + patience < self.opened:
                self.count[name, row] = 0
                self.evicted[name] += 1
                reset.append((name, row))
            self.count[name, row] += times
            self.last[name, row] = self.clock
        return reset

    def place(self, name, row):
        """The row that is used."""
        return STARTS[name] + (row if self.count[name, row] >= RULES.get(name, (0, 0))[0] else 0)


def test_an_id_of_every_day_is_never_reset_however_long_a_window_is():
    net, optimizer = made()
    random = np.random.default_rng(0)
    for window in range(4):
        for day in random.permutation(np.arange(3 * window, 3 * window + 3, 0.25)):  # evict_after_days is 1 and 2
            observe(net, optimizer, [batch(random, 200, day, window)])
    values = admission_of(net).values()
    assert [values[f"{name}/evicted"] for name in RULES] == [0, 0, 0]


def test_rows_are_counted_admitted_and_reset_as_a_record_per_row_says():
    net, optimizer = made()
    record, admission = Record(), admission_of(net)
    resets = 0
    for found in stream(steps=60):
        tables = {dim: net.embeddings.tables[f"dim_{dim}"].weight for dim in (2, 4)}
        sums = {dim: optimizer.state[weight]["sum"] for dim, weight in tables.items() if weight in optimizer.state}
        before = {dim: weight.detach().clone() for dim, weight in tables.items()}
        reset = record.see(found)
        observe(net, optimizer, [found])
        for name, row in reset:
            dim, place = WIDTH[name], torch.tensor([STARTS[name] + row])
            assert torch.equal(tables[dim][place].detach(), fresh_rows(place, dim))
            assert torch.equal(sums[dim][place], torch.full((1, dim), 0.1))
            before[dim][place] = fresh_rows(place, dim)
            resets += 1
        assert_equal(before, {dim: weight.detach() for dim, weight in tables.items()})  # nothing else has changed
        for column, name in enumerate(("plain", "item", "shop")):
            wanted = [record.place(name, row) for row in found.onehot_BC[:, (0, 1, 3)[column]].tolist()]
            assert net.embeddings.places(found, 4)[0][:, column].tolist() == wanted
        wanted = [record.place("user", row) for row in found.onehot_BC[:, 2].tolist()]
        assert net.embeddings.places(found, 2)[0][:, 0].tolist() == wanted
        lists = [record.place("item", row) for row in found.ragged["history"].values.tolist()]
        lists += (found.ragged["tags"].values + 26).tolist()
        assert net.embeddings.places(found, 4)[1].tolist() == lists
        values = admission.values()
        for name, (limit, _) in RULES.items():
            counts = [record.count[key] for key in record.count if key[0] == name]
            assert values[f"{name}/seen"] == len(counts)
            assert values[f"{name}/admitted"] == sum(n >= max(limit, 1) for n in counts) / max(len(counts), 1)
            assert values[f"{name}/evicted"] == record.evicted[name]
        logits = net(found)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, found.labels_BT).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert resets > 10
    assert {name for name in RULES if record.evicted[name]} == {"item", "shop"}


def test_a_rare_id_trains_row_0_and_not_its_own():
    net, optimizer = made()
    found = batch(np.random.default_rng(0), 1, 0)
    found.onehot_BC[0] = torch.tensor([1, 5, 5, 5])
    found = Batch(
        **{
            **vars(found),
            "ragged": {name: Ragged(torch.empty(0).long(), torch.zeros(2).long()) for name in found.ragged},
        }
    )
    weight = net.embeddings.tables["dim_4"].weight
    changed = []
    for _ in range(4):
        before = weight.detach().clone()
        step(net, optimizer, [found])
        changed.append([row for row in (7, 12) if not torch.equal(weight.detach()[row], before[row])])
    assert changed == [[7], [7], [12], [12]]  # admit_after: 3


@pytest.mark.parametrize("method", ["adagrad", "clippy", "lamb_adam"])
def test_shares_in_any_order_and_a_restored_state_give_the_same_bits(method):
    batches = stream(steps=24, rows=4)
    net, optimizer = made(method)
    for found in batches[:10]:
        step(net, optimizer, [found])
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    for found in batches[10:]:
        step(net, optimizer, [found])
    again, other = made(method)
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    for found in batches[10:]:
        step(again, other, [found])
    assert_equal(dict(net.state_dict()), dict(again.state_dict()))
    assert admission_of(net).values()["item/evicted"] > 0

    whole, joined = made(method), made(method)
    for found in batches:
        observe(*whole, [found])
        observe(*joined, [found.slice(3, 4), found.slice(0, 3)])
    assert_equal(dict(admission_of(whole[0]).state_dict()), dict(admission_of(joined[0]).state_dict()))


class Ranks:
    """torch.distributed for threads: each is a rank."""

    def __init__(self, world):
        self._world, self._barrier, self._given = world, threading.Barrier(world), [None] * world

    is_available = is_initialized = staticmethod(lambda: True)

    def get_world_size(self):
        return self._world

    def all_gather(self, found, own):
        self._given[int(threading.current_thread().name)] = own
        self._barrier.wait(10)
        for place, given in zip(found, self._given, strict=True):
            place.copy_(given)
        self._barrier.wait(10)


def test_ranks_with_shares_of_their_own_decide_as_one(monkeypatch):
    """test_two_ranks_decide_as_one does the same with processes."""
    batches, shares = stream(steps=40, rows=5), [(0, 3), (3, 5)]
    alone, optimizer = made()
    for found in batches:
        observe(alone, optimizer, [found])
    nets = [made() for _ in shares]
    ranks = Ranks(2)
    monkeypatch.setattr(admission, "dist", ranks)

    def train(number):
        for k, found in enumerate(batches):
            low, high = shares[number] if k % 7 else ((0, 5), (5, 5))[number]  # a rank may have no row
            observe(*nets[number], [found.slice(low, high)])

    threads = [threading.Thread(target=train, args=(number,), name=str(number)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for net, _ in nets:
        assert_equal(dict(alone.state_dict()), dict(net.state_dict()))
    assert admission_of(alone).values()["shop/evicted"] > 0


def test_an_evaluation_counts_nothing_and_a_share_may_be_empty():
    net, optimizer = made()
    (found,) = stream(steps=1)
    step(net, optimizer, [found])
    before = copy.deepcopy(dict(admission_of(net).state_dict()))
    net.eval()
    net(found)
    observe(net, optimizer, [found.slice(0, 0)])
    assert_equal(before, dict(admission_of(net).state_dict()))


def test_without_a_rule_nothing_is_kept():
    schema = Schema.from_dict(
        {"name": "x", "time_column": "t", "tasks": [{"name": "y"}], "categorical": [{"name": "u", "hash_buckets": 5}]}
    )
    net = SharedBottom(schema, hidden=[8])
    assert admission_of(net) is None
    assert not [name for name in net.state_dict() if "admission" in name]


def test_fresh_weights_are_uniform_and_belong_to_their_row():
    weights = fresh_rows(torch.arange(40_000), 4)
    assert weights.abs().max() <= INIT_RANGE
    assert abs(float(weights.mean())) < 3e-4
    assert float(weights.std()) == pytest.approx(INIT_RANGE / 3**0.5, rel=0.01)
    assert weights.unique().numel() > 150_000
    assert torch.equal(weights[[7, 3]], fresh_rows(torch.tensor([7, 3]), 4))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("admit_after", -1, "admit_after must be a number from 0"),
        ("evict_after_days", -0.5, "evict_after_days must be 0"),
        ("evict_after_days", float("nan"), "evict_after_days must be 0"),
        ("admit_after", 2.5, "admit_after must be int"),
    ],
)
def test_a_rule_that_is_none_is_refused(key, value, wanted):
    plain = {"name": "x", "time_column": "t", "tasks": [{"name": "y"}]}
    with pytest.raises(UserError, match=wanted):
        Schema.from_dict({**plain, "categorical": [{"name": "u", "hash_buckets": 5, key: value}]})


def test_a_rule_belongs_to_the_owner_of_a_table():
    with pytest.raises(UserError, match="belong to 'item', which owns the table"):
        CategoricalFeature(name="history", kind="sequence", table="item", admit_after=2)


def test_tables_that_are_elsewhere_refuse_a_rule():
    refused = pytest.raises(UserError, match="'item': admit_after and evict_after_days need embeddings=local")
    with tables_made_by(lambda schema: pytest.fail("made")), refused:
        SharedBottom(SCHEMA, hidden=[8])
