from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from ranker.data.decode import decode
from ranker.data.hashing import hash_bytes, splitmix64
from ranker.data.row_faults import Place
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.errors import UserError

TASKS = (Task(name="y"),)
PLACE = Place(file="day.parquet", row_group=0)


def decoded(columns, *, dense=(), categorical=(), tasks=TASKS, **options):
    schema = Schema(
        name="s", time_column="t", dense=tuple(dense), categorical=tuple(categorical), tasks=tuple(tasks), **options
    )
    rows = len(next(iter(columns.values())))
    table = pa.table({"t": pa.array(range(rows)), "y": pa.array([0.0] * rows), **columns})
    return decode(table, schema=schema, first_row=100, place=PLACE)


def one_hot(column, **feature):
    batch, faults = decoded({"c": column}, categorical=[CategoricalFeature(name="c", **feature)])
    assert not faults
    assert batch.onehot_BC.dtype == torch.int64
    return batch.onehot_BC[:, 0].tolist()


def ragged(column, **feature):
    batch, faults = decoded({"c": column}, categorical=[CategoricalFeature(name="c", kind="sequence", **feature)])
    assert not faults
    lists = batch.ragged["c"]
    assert lists.offsets[0] == 0
    return [lists.values[a:b].tolist() for a, b in zip(lists.offsets[:-1], lists.offsets[1:], strict=True)]


def test_dense_values_are_scaled_then_transformed_with_their_sign():
    batch, faults = decoded(
        {"a": pa.array([-3000, 0, 1000]), "b": pa.array([1.5, None, -2.0])},
        dense=[DenseFeature(name="a", scale=1e-3, transform="log1p"), DenseFeature(name="b", fill_null=7.0)],
    )
    assert not faults
    assert batch.dense_BF.dtype == torch.float32
    expected = [[-math.log(4), 1.5], [0.0, 7.0], [math.log(2), -2.0]]
    assert torch.allclose(batch.dense_BF, torch.tensor(expected))


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.uint64(), pa.int64()])
def test_ids_move_up_by_one_and_null_is_row_zero(kind):
    assert one_hot(pa.array([0, None, 4], kind), num_embeddings=5) == [1, 0, 5]


def test_large_ids_keep_every_bit():
    ids = [2**53 + 1, 2**53, 2**62 + 3, 2**62 + 2]
    assert one_hot(pa.array(ids), num_embeddings=2**62 + 4) == [i + 1 for i in ids]
    assert len(set(one_hot(pa.array(ids), hash_buckets=10**9))) == 4


def test_booleans_are_ids():
    assert one_hot(pa.array([True, False, None]), num_embeddings=2) == [2, 1, 0]


def test_hashed_ids_stay_within_the_buckets_and_null_is_row_zero():
    ids = np.arange(-50_000, 50_000)
    rows = np.array(one_hot(pa.array(ids), hash_buckets=64))
    assert rows.min() == 1
    assert rows.max() == 64
    counts = np.bincount(rows)[1:]
    assert counts.min() > 0.9 * len(ids) / 64
    assert one_hot(pa.array([5, None]), hash_buckets=64)[1] == 0


def test_the_hash_stays_the_same_over_versions():
    # The first output of SplitMix64 seeded with 0 is published: 0xE220A8397B1DCDAF.
    assert splitmix64(np.array([0])).tolist() == [0xE220A8397B1DCDAF]
    assert one_hot(pa.array([0, 1, -1]), hash_buckets=1000) == [536, 466, 937]
    assert one_hot(pa.array(["", "a", "ab", "Grüße"]), hash_buckets=1000) == [536, 516, 38, 562]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_strings_hash_the_same_however_arrow_writes_them(kind):
    words = ["b", None, "a", "", "b", "ba"]
    rows = one_hot(pa.array(words, pa.string()).cast(kind), hash_buckets=10**6)
    assert rows[1] == 0
    assert rows[0] == rows[4]
    assert len(set(rows)) == 5
    sliced = pa.array(["x", "yy", *words], pa.string()).cast(kind).slice(2)
    assert one_hot(sliced, hash_buckets=10**6) == rows


def test_similar_strings_do_not_collide():
    words = [f"user_{i}" for i in range(100_000)]
    data = np.frombuffer("".join(words).encode(), dtype=np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(word) for word in words])])
    assert len(np.unique(hash_bytes(data, offsets))) == len(words)


def test_as_many_ids_collide_as_with_a_random_hash():
    ids, buckets = 20_000, 50_000
    rows = np.array(one_hot(pa.array(np.arange(ids) * 7919), hash_buckets=buckets))
    _, counts = np.unique(rows, return_counts=True)
    expected = 1 - (1 - 1 / buckets) ** (ids - 1)
    assert counts[counts > 1].sum() / ids == pytest.approx(expected, rel=0.05)


def test_a_vocabulary_maps_what_it_knows_and_the_rest_to_row_zero():
    assert one_hot(pa.array(["fr", "de", "xx", None]), vocabulary=("de", "fr")) == [2, 1, 0, 0]
    assert one_hot(pa.array([30, 10, 20, None], pa.int16()), vocabulary=(10, 30)) == [2, 1, 0, 0]
    encoded = pa.array(["fr", "xx", "fr"]).dictionary_encode()
    assert one_hot(encoded, vocabulary=("de", "fr")) == [2, 0, 2]
    assert one_hot(pa.array([7, 8]).dictionary_encode(), vocabulary=(8,)) == [0, 1]


def test_lists_keep_their_lengths_and_null_lists_are_empty():
    lists = [[1, 2], None, [], [0, None, 3]]
    for kind in (pa.list_(pa.int32()), pa.large_list(pa.int64())):
        assert ragged(pa.array(lists, kind), num_embeddings=4) == [[2, 3], [], [], [1, 0, 4]]
    assert ragged(pa.array([["a"], [], ["b", "c"]]), vocabulary=("c", "b", "a")) == [[3], [], [2, 1]]
    assert ragged(pa.array([None, [1, 2]], pa.list_(pa.int8(), 2)), num_embeddings=4) == [[], [2, 3]]
    assert ragged(pa.array([[9], *lists]).slice(1), num_embeddings=4) == [[2, 3], [], [], [1, 0, 4]]


@pytest.mark.parametrize("feature", [{"num_embeddings": 4}, {"vocabulary": (1, 2)}, {"vocabulary": ("de", "fr")}])
def test_a_column_of_nulls_alone_has_empty_lists(feature):
    assert ragged(pa.nulls(2), **feature) == [[], []]


def test_a_sequence_keeps_its_last_ids():
    lists = pa.array([[0, 1, 2, 3], [4], [], [5, 6, 7]])
    assert ragged(lists, num_embeddings=9, max_length=2) == [[3, 4], [5], [], [7, 8]]


def test_features_that_share_a_table_share_its_ids():
    batch, _ = decoded(
        {"item": pa.array(["b", "a"]), "seen": pa.array([["a", "z"], []], pa.list_(pa.string()))},
        categorical=[
            CategoricalFeature(name="item", vocabulary=("a", "b")),
            CategoricalFeature(name="seen", kind="sequence", table="item"),
        ],
    )
    assert batch.onehot_BC[:, 0].tolist() == [2, 1]
    assert batch.ragged["seen"].values.tolist() == [1, 0]


def test_labels_are_masked_scaled_transformed_and_cut_at_a_threshold():
    batch, faults = decoded(
        {
            "stars": pa.array([3, 4, None, 5]),
            "ms": pa.array([1000.0, None, 3000.0, 7000.0]),
            "seen": pa.array([True, True, None, False]),
        },
        categorical=[CategoricalFeature(name="t", num_embeddings=9)],
        tasks=[
            Task(name="like", column="stars", at_least=4),
            Task(name="watch", type="regression", column="ms", scale=1e-3, transform="log1p", mask="seen"),
        ],
    )
    assert not faults
    assert torch.allclose(batch.labels_BT, torch.tensor([[0, math.log(2)], [1, 0], [0, 0], [1, 0]]))
    assert batch.mask_BT.tolist() == [[True, True], [True, False], [False, False], [True, False]]


@pytest.mark.parametrize(
    ("column", "unit"),
    [
        (pa.array([1_650_000_000, 1_650_000_001]), "s"),
        (pa.array([1_650_000_000_000, 1_650_000_001_000]), "ms"),
        (pa.array([1_650_000_000_000_999, 1_650_000_001_000_000]), "us"),
        (pa.array([1_650_000_000_000_999_999, 1_650_000_001_000_000_000]), "ns"),
        (pa.array([1_650_000_000.0004, 1_650_000_001.0]), "s"),
        (pa.array([1_650_000_000, 1_650_000_001], pa.timestamp("s")), "ns"),
        (pa.array([1_650_000_000_000_001, 1_650_000_001_000_000], pa.timestamp("us", tz="UTC")), "ms"),
    ],
)
def test_times_are_milliseconds_from_any_unit(column, unit):
    batch, _ = decoded({"t": column}, dense=[DenseFeature(name="y")], time_unit=unit)
    assert batch.time_ms_B.tolist() == [1_650_000_000_000, 1_650_000_001_000]


def test_no_rows_decode_to_an_empty_batch():
    batch, faults = decoded(
        {"a": pa.array([], pa.string()), "b": pa.array([], pa.list_(pa.int32()))},
        categorical=[
            CategoricalFeature(name="a", hash_buckets=9),
            CategoricalFeature(name="b", kind="multi_hot", num_embeddings=9, max_length=2),
        ],
    )
    assert len(batch) == 0
    assert not faults
    assert batch.ragged["b"].offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("column", "task", "reason", "rows"),
    [
        (pa.array([5.0, math.nan, 1.0]), {"at_least": 4.0}, "label NaN or infinity", [1]),
        (pa.array([1e38, 2.0, -1e38]), {"type": "regression"}, "label above 1e+15 (1e+38)", [0, 2]),
        (pa.array([3.0, 2.0, 1.0]), {"type": "regression", "scale": 1e30}, "label above 1e+15 (3e+30)", [0, 1, 2]),
    ],
)
def test_a_label_that_would_be_misread_or_overflow_is_a_fault(column, task, reason, rows):
    _, (fault,) = decoded(
        {"z": column, "x": pa.array([0.0] * 3)}, dense=[DenseFeature(name="x")], tasks=[Task(name="z", **task)]
    )
    assert fault.reason == reason
    assert fault.rows.tolist() == rows


def test_a_mask_is_true_or_false_and_nothing_else():
    task = Task(name="z", mask="m")
    columns = {"x": pa.array([0.0] * 4), "z": pa.array([1, 1, 1, 1]), "m": pa.array([0, 1, 2, -1])}
    batch, (fault,) = decoded(columns, dense=[DenseFeature(name="x")], tasks=[task])
    assert fault.reason == "mask neither 0 nor 1 (2)"
    assert fault.rows.tolist() == [2, 3]
    assert batch.mask_BT[:, 0].tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", [pa.bool_(), pa.float16(), pa.uint64(), pa.decimal128(5, 1)])
def test_a_threshold_applies_to_every_kind_of_number(kind):
    columns = {"x": pa.array([0.0] * 3), "z": pa.array([0, 1, None], pa.int8()).cast(kind)}
    batch, faults = decoded(columns, dense=[DenseFeature(name="x")], tasks=[Task(name="z", at_least=0.5)])
    assert not faults
    assert batch.labels_BT[:, 0].tolist() == [0, 1, 0]
    assert batch.mask_BT[:, 0].tolist() == [True, True, False]


def test_integers_of_a_vocabulary_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="column 'c', row group 0: an integer does not fit int64"):
        one_hot(pa.array([2**63 + 1], pa.uint64()), vocabulary=(1, 2))
