"""Row weights and group keys, from the schema and the files to the batches of each rank."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ranker.capsules.capsule import read_share, write_share
from ranker.data.batch import NO_GROUP, Batch
from ranker.data.decode import decode
from ranker.data.loader import EvalLoader, WindowedLoader
from ranker.data.log import Selected
from ranker.data.parquet_log import ParquetLog
from ranker.data.row_faults import Place
from ranker.data.schema import DenseFeature, GroupColumn, Schema, Task
from ranker.data.synthetic import SyntheticLog
from ranker.data.windows import plan_windows
from ranker.errors import UserError

PLACE = Place(file="day.parquet", row_group=0)
PLAIN = {
    "name": "shop",
    "time_column": "t",
    "dense": [{"name": "x"}],
    "tasks": [{"name": "y", "group": "session"}, {"name": "z"}],
    "weight": "w",
    "groups": [{"name": "user", "column": "user_id"}, {"name": "session"}],
}


def schema(**changes):
    return Schema.from_dict({**PLAIN, **changes})


def decoded(**columns):
    rows = len(next(iter(columns.values())))
    plain = {"t": range(rows), "x": [0.0] * rows, "y": [1] * rows, "z": [0] * rows, "w": [1.0] * rows}
    plain |= {"user_id": range(rows), "session": ["s"] * rows}
    return decode(pa.table({**plain, **columns}), schema=schema(), first_row=0, place=PLACE)


def test_a_schema_with_weight_and_groups_comes_back_as_it_was_written(tmp_path):
    one = schema()
    one.to_yaml(tmp_path / "schema.yaml")
    assert Schema.from_yaml(tmp_path / "schema.yaml") == one
    assert one.columns() == ["t", "x", "y", "z", "w", "user_id", "session"]
    assert [one.group_of(task) for task in one.tasks] == ["session", "user"]
    assert {"weight", "groups"}.isdisjoint(schema(weight="", groups=[], tasks=[{"name": "y"}]).to_dict())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"groups": [{"name": "user"}]}, "group 'session' of task 'y' is not under groups:"),
        ({"groups": [{"name": "session"}, {"name": "session", "column": "b"}]}, "two groups are called 'session'"),
        ({"groups": [{"name": "session"}, {"name": "a.b"}]}, "group name 'a.b' must not hold"),
        ({"groups": [{"name": "session", "kind": "one_hot"}]}, "unknown key 'kind'"),
        ({"weight": 3}, "weight must be str"),
    ],
)
def test_what_no_schema_can_mean_is_one_line(changes, said):
    with pytest.raises(UserError, match=said):
        schema(**changes)


def test_integer_keys_are_themselves_and_equal_strings_have_equal_keys():
    words = ["a", "b", None, "a", ""]
    batch, faults = decoded(user_id=pa.array([2**62, -5, None, 0, 0]), session=pa.array(words))
    assert not faults
    assert batch.groups_BG[:, 0].tolist() == [2**62, -5, NO_GROUP, 0, 0]
    keys = batch.groups_BG[:, 1].tolist()
    assert keys[0] == keys[3]
    assert keys[2] == NO_GROUP
    assert len({*keys}) == 4
    for column in (pa.array(words).dictionary_encode(), pa.array(words, pa.large_string())):
        again, _ = decoded(user_id=pa.nulls(5), session=column)
        assert again.groups_BG[:, 1].tolist() == keys
        assert set(again.groups_BG[:, 0].tolist()) == {NO_GROUP}


def test_a_row_of_weight_zero_has_no_label():
    batch, faults = decoded(w=pa.array([0, 2, 1], pa.int32()))
    assert not faults
    assert batch.weight_B.tolist() == [0.0, 2.0, 1.0]
    assert batch.mask_BT.tolist() == [[False, False], [True, True], [True, True]]


@pytest.mark.parametrize(
    ("weight", "said"), [(None, "null weight"), (-1.0, "weight -1"), (math.nan, "weight nan"), (math.inf, "weight inf")]
)
def test_a_weight_that_is_none_is_a_fault_of_its_row(weight, said):
    batch, faults = decoded(w=pa.array([1.0, weight], pa.float64()))
    assert [fault.reason for fault in faults] == [said]
    assert faults[0].rows.tolist() == [1]
    assert batch.weight_B.tolist() == [1.0, 0.0]


def log_schema_with_keys(log_schema):
    return replace(log_schema, weight="price", groups=(GroupColumn(name="user"), GroupColumn(name="country")))


def same_rows(batch, expected):
    """Whether each row has the weight and keys of its row id."""
    rows = batch.row_B
    return torch.equal(batch.weight_B, expected.weight_B[rows]) and torch.equal(
        batch.groups_BG, expected.groups_BG[rows]
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_and_keys_stay_with_their_rows_through_windows_and_ranks(write_log, log_schema, ranks):
    log = ParquetLog(str(write_log({0: 33, 1: 30, 2: 20}, schema=log_schema_with_keys(log_schema))))
    whole = log.read(0, log.num_rows)
    assert whole.weight_B.tolist() == [row / 4 for row in range(83)]
    assert whole.groups_BG[:, 0].tolist() == [row * 2**33 for row in range(83)]
    assert len({*whole.groups_BG[:, 1].tolist()}) == 3
    plan = plan_windows(log, window=20, batch_size=8)
    seen = 0
    for rank in range(ranks):
        options = {"rank": rank, "world_size": ranks}
        for batch in WindowedLoader(log, plan=plan, seed=1, opening=True, num_workers=0, **options):
            seen += len(batch)
            assert same_rows(batch, whole)
            assert batch.opening is None or same_rows(batch.opening, whole)
        for batch in EvalLoader(log, start=63, stop=83, batch_size=7, **options):
            assert same_rows(batch, whole)
    assert seen == 63
    few = Selected(log, log.schema.select(tasks=["click"])).read(3, 9)
    assert few.weight_B.tolist() == whole.weight_B[3:9].tolist()


def test_a_bad_weight_is_named_with_its_file_or_dropped(write_log, log_schema):
    def spoil(day, columns):
        columns["price"] = pa.array(np.where(np.arange(20) == 13, -1.0, 1.0))

    root = str(write_log({0: 20, 1: 20}, schema=log_schema_with_keys(log_schema), change=spoil))
    with pytest.raises(UserError, match=r"day=2022-04-25.parquet, column 'price', row group 1: weight -1 in 1 rows"):
        ParquetLog(root).read(0, 40)
    log = ParquetLog(root, on_bad_rows="drop")
    batch = log.read(0, 40)
    assert log.num_bad_rows == 2
    assert (~batch.mask_BT[:, 0]).nonzero()[:, 0].tolist() == [13, 33]


@pytest.mark.parametrize(
    ("column", "kind", "said"),
    [
        ("price", pa.string(), "a weight is a number"),
        ("country", pa.float64(), "keys of group 'country' are integers or strings"),
        ("country", pa.list_(pa.int64()), "keys of group 'country' are integers or strings"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused_when_the_log_is_opened(write_log, log_schema, column, kind, said):
    keyed = replace(log_schema, dense=(), categorical=log_schema.categorical[:1], weight="price")
    keyed = replace(keyed, groups=(GroupColumn(name="country"),), dense=(DenseFeature(name="watch"),))

    def change(day, columns):
        columns[column] = pa.nulls(10, kind)

    with pytest.raises(UserError, match=said):
        ParquetLog(str(write_log({0: 10, 1: 10}, schema=keyed, change=change)))


def test_keys_that_are_strings_in_one_file_and_integers_in_another_are_refused(write_log, log_schema):
    keyed = replace(log_schema, categorical=log_schema.categorical[:1], groups=(GroupColumn(name="slot"),))

    def change(day, columns):
        if day:
            columns["slot"] = columns["slot"].cast(pa.string())

    with pytest.raises(UserError, match="column 'slot' are strings, but integers in"):
        ParquetLog(str(write_log({0: 10, 1: 10}, schema=keyed, change=change)))


def test_a_group_may_stand_in_the_names_of_folders(tmp_path):
    keyed = Schema(
        name="s",
        time_column="t",
        dense=(DenseFeature(name="x"),),
        tasks=(Task(name="y"),),
        groups=(GroupColumn(name="country"),),
    )
    keyed.to_yaml(tmp_path / "schema.yaml")
    for number, country in enumerate(("de", "fr")):
        (tmp_path / f"country={country}").mkdir()
        times = pa.array([number * 86_400_000 + 1_650_844_800_000] * 3)
        table = pa.table({"t": times, "x": [0.0] * 3, "y": [0, 1, 0]})
        pq.write_table(table, tmp_path / f"country={country}" / "part.parquet")
    keys = ParquetLog(str(tmp_path)).read(0, 6).groups_BG[:, 0].tolist()
    assert len({*keys[:3]}) == len({*keys[3:]}) == 1
    assert keys[0] != keys[3]


def test_weights_of_the_synthetic_stream_change_nothing_else():
    options = {"train_rows": 9000, "eval_rows": 10, "num_users": 50, "num_items": 40, "signals": 2}
    plain, weighted = (SyntheticLog(**options, row_weights=spread).read(8000, 9000) for spread in (0.0, 0.5))
    assert plain.weight_B is None
    assert float(weighted.weight_B.log().std()) == pytest.approx(0.5, rel=0.1)
    for name, column in plain.columns().items():
        assert torch.equal(column, getattr(weighted, name))
    assert torch.equal(plain.groups_BG[:, 0] + 1, plain.onehot_BC[:, 0])  # the user's embedding row
    with pytest.raises(UserError, match="row_weights"):
        SyntheticLog(row_weights=-1.0)


def test_a_capsule_keeps_weights_and_keys_and_reads_those_without(tmp_path):
    with_both = SyntheticLog(train_rows=100, eval_rows=10, row_weights=1.0).read(0, 10)
    without = replace(with_both, weight_B=None, groups_BG=None)
    for batch in (with_both, without):
        write_share(tmp_path / "rank0.pt", [batch], torch.zeros(1))
        ((read,), _) = read_share(tmp_path / "rank0.pt")
        assert read.columns().keys() == batch.columns().keys()
        for name, column in batch.columns().items():
            assert torch.equal(column, getattr(read, name))


def test_batches_with_weights_are_sliced_taken_and_joined():
    rows = SyntheticLog(train_rows=100, eval_rows=10, row_weights=1.0).read(0, 10)
    parts = [rows.slice(0, 3), rows.slice(3, 3), rows.slice(3, 10)]
    again = Batch.concat(parts).take(torch.arange(10))
    for name, column in rows.columns().items():
        assert torch.equal(column, getattr(again, name))
    assert rows.to("meta").weight_B.is_meta
