"""A profile of a log that is made part by part, as a cluster does, says what one of the whole log says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.column_profile import ColumnProfile
from ranker.data.raw_log import RawLog, profiled


def write(folder):
    random = np.random.default_rng(0)
    for number in range(2):
        rows = 5000
        table = pa.table(
            {
                "number": pa.array([None if i % 9 == 0 else float(i) for i in random.integers(0, 10**6, rows)]),
                "text": [("1,234", "yes", "x", None)[i % 4] for i in range(rows)],
                "list": [[int(i)] * (i % 3) for i in range(rows)],
                "nan": np.where(random.random(rows) < 0.1, np.nan, random.random(rows)),
                "null": pa.nulls(rows) if number == 0 else pa.array([1] * rows),
            }
        )
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=700)
    return RawLog.open(str(folder))


def test_profiles_of_row_groups_add_up_to_that_of_the_log(tmp_path):
    log = write(tmp_path)
    whole, pieces = profiled(log), log.pieces(1500)
    assert [groups for file, groups in pieces if file.name == "part-0.parquet"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    joined = {name: ColumnProfile(name) for name in whole.columns}
    rows = 0
    for file, groups in pieces:
        part = profiled(dataclasses.replace(log, files=(file,), skipped={}), groups=groups)
        rows += part.rows
        for name, column in part.columns.items():
            joined[name].merge(column)
    assert rows == whole.rows == 10_000
    for name, column in whole.columns.items():
        for field in dataclasses.fields(column):
            if field.name not in ("distinct", "frequent", "elements"):
                assert getattr(joined[name], field.name) == getattr(column, field.name), (name, field.name)
        assert joined[name].distinct.estimate == column.distinct.estimate
        if column.distinct.estimate < 1000:  # of more, counts are within their bounds
            assert joined[name].frequent.head(5) == column.frequent.head(5)
    assert joined["list"].elements.high == whole.columns["list"].elements.high
    assert [profiled(log, names=["text"]).columns.keys()] == [{"text"}]
