"""Scoring a Parquet file in pieces: row ids, bad rows, and atomic output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ranker.data.batch import Batch
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.errors import UserError
from ranker.export.bundle import new_folder
from ranker.export.program_runtime import Scored
from ranker.export.scoring import ParquetRows, score_file

SCHEMA = Schema(
    name="toy",
    time_column="t",
    row_id="event",
    dense=(DenseFeature(name="x"),),
    categorical=(CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=9),),
    tasks=(Task(name="click"),),
)
TASKS = ["click"]


class Echo:
    """Scores a row with its dense feature plus the number of its tags."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, batch: Batch) -> Scored:
        self.sizes.append(len(batch))
        scores = batch.dense_BF + batch.ragged["tags"].offsets.diff()[:, None]
        return Scored(scores, scores)


def write(path: Path, rows: int, *, group: int = 100, **changed: Any) -> Path:
    columns: dict[str, Any] = {
        "event": [1000 + i for i in range(rows)],
        "x": [i / 4 for i in range(rows)],
        "tags": [[1] * (i % 3) for i in range(rows)],
    }
    columns = {name: values for name, values in (columns | changed).items() if values is not None}
    types = {"tags": pa.list_(pa.int64())}
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    pq.write_table(table, path, row_group_size=group)
    return path


def score(file: Path, out: Path, *, piece_rows: int = 40, on_bad_rows: str = "raise") -> tuple[Echo, int]:
    engine = Echo()
    rows = ParquetRows(file, SCHEMA, piece_rows=piece_rows, on_bad_rows=on_bad_rows)
    return engine, score_file(rows, engine, out, tasks=TASKS)


def test_every_row_is_scored_once_in_order_in_pieces_that_end_with_row_groups(tmp_path: Path) -> None:
    engine, missing = score(write(tmp_path / "in.parquet", 250), tmp_path / "out.parquet")

    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names == ["event", "click"]
    assert found["event"].to_pylist() == list(range(1000, 1250))
    assert found["click"].to_pylist() == [i / 4 + i % 3 for i in range(250)]
    assert engine.sizes == [40, 40, 20, 40, 40, 20, 40, 10]
    assert missing == 0


def test_without_a_column_of_ids_a_row_is_named_by_its_position(tmp_path: Path) -> None:
    score(write(tmp_path / "in.parquet", 130, event=None), tmp_path / "out.parquet")

    assert pq.read_table(tmp_path / "out.parquet")["row"].to_pylist() == list(range(130))


def test_columns_of_the_file_can_be_kept_as_they_are(tmp_path: Path) -> None:
    file = write(
        tmp_path / "in.parquet",
        250,
        user=[f"u{i % 7}" for i in range(250)],
        price=[None if i % 5 == 0 else Decimal(i) / 4 for i in range(250)],
        place=[{"country": "de", "n": i} for i in range(250)],
    )
    rows = ParquetRows(file, SCHEMA, piece_rows=40, keep=["place", "user", "x", "price"])
    score_file(rows, Echo(), tmp_path / "out.parquet", tasks=TASKS)

    found, given = pq.read_table(tmp_path / "out.parquet"), pq.read_table(file)
    assert found.column_names == ["event", "place", "user", "x", "price", "click"]
    assert found.select(rows.kept.names).equals(given.select(rows.kept.names))
    assert found["click"].to_pylist() == [i / 4 + i % 3 for i in range(250)]


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (["usr"], "--keep 'usr' is unknown; did you mean 'user'"),
        (["click"], "--keep click: the output has a column of this name already"),
        (["event"], "--keep event: the output has a column of this name already"),
        (["user", "user"], "--keep names a column twice: user, user"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(keep: list[str], told: str, tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", 10, user=["u"] * 10, click=[0] * 10)
    with pytest.raises(UserError, match=re.escape(told)):
        ParquetRows(file, SCHEMA, piece_rows=40, keep=keep)


def test_a_file_without_rows_gives_one_without_rows(tmp_path: Path) -> None:
    score(
        write(tmp_path / "in.parquet", 0, event=pa.array([], pa.int64()), x=pa.array([], pa.float32())), tmp_path / "o"
    )

    assert pq.read_table(tmp_path / "o").num_rows == 0


def test_a_bad_row_is_named_by_its_place_in_the_row_group(tmp_path: Path) -> None:
    x = [float("nan") if i == 170 else 0.0 for i in range(250)]

    with pytest.raises(UserError, match=r"column 'x', row group 1: NaN or infinity in 1 rows, first in row 70"):
        score(write(tmp_path / "in.parquet", 250, x=x), tmp_path / "out.parquet")

    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_a_bad_row_can_go_without_a_score(tmp_path: Path) -> None:
    x = [float("nan") if i == 170 else 0.0 for i in range(250)]

    _, missing = score(write(tmp_path / "in.parquet", 250, x=x), tmp_path / "out.parquet", on_bad_rows="null")

    found = pq.read_table(tmp_path / "out.parquet")["click"]
    assert missing == found.null_count == 1
    assert found[170].as_py() is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"x": None}, "column 'x' of schema 'toy' is missing"),
        ({"x": ["a"] * 5}, "column 'x' is string; dense feature 'x' is a number"),
        ({"tags": [[-1]] * 5}, r"id below 0 \(-1\) in 5 rows"),
        ({"event": ["a"] * 5}, "row id 'event' is string, no integer"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        score(write(tmp_path / "in.parquet", 5, **changed), tmp_path / "out.parquet")

    assert not (tmp_path / "out.parquet").exists()


def strict(file: Path, out: Path, *, schema: Schema = SCHEMA, **options: Any) -> list[str]:
    """Scores a file; returns the columns of the output."""
    rows = ParquetRows(file, schema, piece_rows=40, **options)
    score_file(rows, Echo(), out, tasks=schema.task_names)
    return pq.read_schema(out).names


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tags": [[99]] * 5}, "read such ids as unknown with --unseen-ids unknown, or give such rows no score with"),
        ({"x": [None] * 4 + [1.0]}, "correct the file, or give such rows no score with --on-bad-rows null"),
    ],
)
def test_the_advice_names_options_of_score(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told) as caught:
        strict(write(tmp_path / "in.parquet", 5, **changed), tmp_path / "out.parquet")

    assert "on_bad_rows to drop" not in str(caught.value)
    assert "num_embeddings" not in str(caught.value)


def test_unseen_ids_can_be_read_as_unknown(tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", 5, tags=[[99, 1], [-4], [3], [], [8]])
    seen = []
    for piece in ParquetRows(file, SCHEMA, piece_rows=40, unseen_ids="unknown"):
        assert len(piece.bad) == 0
        seen += piece.batch.ragged["tags"].values.tolist()

    assert seen == [0, 2, 0, 4, 9]


def test_ids_of_another_type_than_in_training_are_refused(tmp_path: Path) -> None:
    tags = CategoricalFeature(name="tags", kind="multi_hot", hash_buckets=9)
    schema = Schema(name="toy", time_column="t", dense=SCHEMA.dense, categorical=(tags,), tasks=SCHEMA.tasks)
    file = tmp_path / "in.parquet"
    pq.write_table(pa.table({"x": [1.0, 2.0], "tags": [["1"], ["2", "3"]]}), file)

    told = "in column 'tags' are strings, but the model was trained on integers"
    with pytest.raises(UserError, match=told):
        strict(file, tmp_path / "out.parquet", schema=schema, id_types={"tags": "integer"})
    strict(file, tmp_path / "out.parquet", schema=schema, id_types={"tags": "string"})
    strict(file, tmp_path / "out.parquet", schema=schema)  # an export that does not say


@pytest.mark.parametrize(("row_id", "first"), [("", "row_id"), ("event", "event")])
def test_a_task_may_be_called_row(tmp_path: Path, row_id: str, first: str) -> None:
    tasks = (Task(name="row"),)
    schema = Schema(
        name="t", time_column="t", row_id=row_id, dense=SCHEMA.dense, categorical=SCHEMA.categorical, tasks=tasks
    )
    assert strict(write(tmp_path / "in.parquet", 5), tmp_path / "out.parquet", schema=schema) == [first, "row"]


@pytest.mark.parametrize("content", [b"", b"not parquet at all"])
def test_what_is_no_parquet_file_is_said(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(content)

    with pytest.raises(UserError, match="is no Parquet file"):
        score(tmp_path / "in.parquet", tmp_path / "out.parquet")


def test_an_interruption_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_text("old")
    rows = ParquetRows(write(tmp_path / "in.parquet", 250), SCHEMA, piece_rows=40)

    def stopped(batch: Batch) -> Scored:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_file(rows, stopped, tmp_path / "out.parquet", tasks=TASKS)

    assert (tmp_path / "out.parquet").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_no_more_than_a_few_pieces_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ParquetRows(write(tmp_path / "in.parquet", 1000, group=1000), SCHEMA, piece_rows=10)
    made = 0
    decode = ParquetRows._piece

    def counted(self: ParquetRows, *given: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        return decode(self, *given, **named)

    monkeypatch.setattr(ParquetRows, "_piece", counted)
    pieces: Iterator[Any] = iter(rows)
    for _ in range(3):
        next(pieces)

    assert made <= 6
    assert torch.equal(next(pieces).batch.row_B, torch.arange(1030, 1040))


def test_a_folder_that_could_not_be_filled_is_not_there_and_an_old_one_is(tmp_path: Path) -> None:
    def fill(replace: bool, words: str) -> None:
        with new_folder(tmp_path / "export", replace=replace) as draft:
            (draft / "export.json").write_text(words)
            if words == "broken":
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill(False, "broken")
    assert list(tmp_path.iterdir()) == []
    fill(False, "first")
    with pytest.raises(UserError, match="--force"):
        fill(False, "second")
    with pytest.raises(OSError, match="disk full"):
        fill(True, "broken")
    assert (tmp_path / "export" / "export.json").read_text() == "first"
    fill(True, "second")
    assert (tmp_path / "export" / "export.json").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
