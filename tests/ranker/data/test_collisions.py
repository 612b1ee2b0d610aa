"""How many ids share a hash bucket: counted, and as chance would have it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranker.commands.data_commands import inspect
from ranker.data import collisions
from ranker.data.collisions import Collisions, buckets_for, collisions_of, expected_share
from ranker.data.hashing import splitmix64
from ranker.data.parquet_log import ParquetLog
from ranker.data.schema import CategoricalFeature, Schema, Task


def share(buckets):
    counts = Counter(buckets)
    return sum(n for n in counts.values() if n > 1) / len(buckets)


@pytest.mark.parametrize(("ids", "buckets"), [(1, 10), (50, 1000), (3000, 1000), (20_000, 40_000)])
def test_the_share_is_counted_exactly_and_close_to_chance(ids, buckets):
    found = Collisions(buckets)
    hashes = splitmix64(np.arange(ids, dtype=np.int64) * 7)
    for part in np.array_split(np.concatenate([hashes, hashes]), 5):
        found.add(part)
    assert found.ids == ids
    assert found.measured == pytest.approx(share((hashes % np.uint64(buckets)).tolist()))
    assert found.measured == pytest.approx(found.expected, abs=0.08 if ids < 100 else 0.03)


def test_of_a_large_table_some_buckets_are_looked_at(monkeypatch):
    monkeypatch.setattr(collisions, "KEPT_IDS", 4000)
    hashes = splitmix64(np.arange(50_000, dtype=np.int64))
    found = Collisions(30_000)
    for part in np.array_split(hashes, 7):
        found.add(part)
    assert found.step == 16
    assert len(found._hashes) <= 4000
    assert found.ids == pytest.approx(50_000, rel=0.05)
    assert found.measured == pytest.approx(share((hashes % np.uint64(30_000)).tolist()), abs=0.03)


def test_buckets_are_proposed_that_bring_the_share_down():
    for ids in (2, 100, 12_345, 10**8):
        assert 0.045 < expected_share(ids, buckets_for(ids, 0.05)) <= 0.05 or ids == 2
    assert buckets_for(12_345, 0.05) == 250_000
    assert (expected_share(0, 5), expected_share(1, 5), expected_share(2, 1)) == (0.0, 0.0, 1.0)


def log(root, kind=None):
    schema = Schema(
        name="ids",
        time_column="t",
        categorical=(
            CategoricalFeature(name="user", hash_buckets=40),
            CategoricalFeature(name="history", kind="sequence", table="user"),
            CategoricalFeature(name="word", hash_buckets=10_000),
            CategoricalFeature(name="slot", num_embeddings=3),
        ),
        tasks=(Task(name="click"),),
    )
    root.mkdir()
    schema.to_yaml(root / "schema.yaml")
    row = np.arange(120)
    table = pa.table(
        {
            "t": 1_767_225_600_000 + row * 1_000_000,
            "user": pa.array([None if i == 5 else i % 20 for i in row], pa.int64()),
            "history": [[i % 50, None][: i % 3] for i in row.tolist()],
            "word": pa.array([("a", "b", None)[i % 3] for i in row]).dictionary_encode(),
            "slot": row % 3,
            "click": row % 2,
        }
    )
    pq.write_table(table, root / "day.parquet", row_group_size=50)
    return root


def test_features_that_share_a_table_are_counted_together(tmp_path):
    found = collisions_of(ParquetLog(str(log(tmp_path / "log")), hold_out=0.2))
    assert set(found) == {"user", "word"}
    ids = {i % 20 for i in range(120)} | {i % 50 for i in range(120) if i % 3}
    assert found["user"].ids == len(ids)
    buckets = splitmix64(np.array(sorted(ids), dtype=np.int64)) % np.uint64(40)
    assert found["user"].measured == pytest.approx(share(buckets.tolist()))
    assert (found["word"].ids, found["word"].measured) == (2, 0.0)


def test_inspection_says_how_many_ids_share_a_bucket(tmp_path, capsys):
    root = log(tmp_path / "log")
    table = pq.read_table(root / "day.parquet")
    times = pa.array(1_767_225_600_000 + np.arange(120) * 1_440_000)
    pq.write_table(table.set_column(0, "t", times), root / "day.parquet")
    assert inspect([str(root)]) == 0
    out = capsys.readouterr().out
    assert "table 'user': 50 ids in 40 buckets; " in out
    assert "% by chance)" in out
    assert "warning: " in out
    assert "of the ids of 'user' share their bucket with another one; hash_buckets: 960 would bring that to 5 %" in out
    assert "of the ids of 'word'" not in out
