"""Preparation by Spark gives the rows of preparation by Polars. make test-spark runs these tests."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("pyspark", reason="needs PySpark and Java 17: make test-spark")

from ranker.data.manifest import Manifest
from ranker.data.parquet_log import ParquetLog
from ranker.data.prepare import prepare, spark, steps
from ranker.data.prepare.own import prepare_own
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.errors import UserError
from support import assert_equal

ROOT = Path(__file__).parents[3]
START_MS = 1_767_225_600_000
SCHEMA = Schema(
    name="shop",
    time_column="ts",
    dense=(DenseFeature(name="price", transform="log1p", fill_null=0.0),),
    categorical=(
        CategoricalFeature(name="user", hash_buckets=1000),
        CategoricalFeature(name="country", vocabulary=("de", "fr")),
        CategoricalFeature(name="tags", kind="multi_hot", hash_buckets=50),
    ),
    tasks=(Task(name="click"),),
)


@pytest.fixture(scope="module")
def cluster():
    settings = {"spark.ui.enabled": "false", "spark.driver.memory": "1g", "spark.sql.shuffle.partitions": "2"}
    with spark.cluster("local[2]", settings) as running:
        yield running


def rows(root):
    manifest = Manifest.read(root)
    return pl.concat([pl.read_parquet(root / entry.path, hive_partitioning=False) for entry in manifest.files])


def assert_same(one, other):
    """Two prepared folders hold the same rows in the same order, and tell the same of them."""
    assert rows(one).schema == rows(other).schema
    assert rows(one).equals(rows(other))
    assert (one / "schema.yaml").read_bytes() == (other / "schema.yaml").read_bytes()
    a, b = Manifest.read(one), Manifest.read(other)
    assert {**a.source, "source": ""} == {**b.source, "source": ""}
    assert (a.rows, a.days) == (b.rows, b.days)
    assert not [path for path in other.rglob("*") if path.name.startswith((".", "staging"))]
    logs = [ParquetLog(str(root)) for root in (one, other)]
    batches = [log.read(0, log.num_rows) for log in logs]
    assert [log.train_rows for log in logs] == [logs[0].train_rows] * 2
    assert_equal(*({name: getattr(batch, name) for name in ("dense_BF", "onehot_BC", "row_B")} for batch in batches))


def made_up(folder, *, files=3, each=400):
    """A dirty CSV log in no order: broken lines, rows without a time, repeated rows, texts as numbers."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(files):
        lines = ["ts,price,user,country,click"]
        for i in range(each):
            moment = np.datetime64(START_MS + int(random.integers(3 * 86_400_000)), "ms")
            price = ("1,234.5", "", "7", "NaN")[i % 4]
            lines.append(f'{moment}Z,"{price}",u{random.integers(50)},{("de", "fr", "uk")[i % 3]},{i % 2}')
        lines += [*lines[1:9], "never,1,u1,de,1", "2026-01-01T00:00:00Z,1"]
        (folder / f"log-{number}.csv").write_text("\n".join(lines) + "\n")
    return folder


CSV_SCHEMA = replace(SCHEMA, categorical=SCHEMA.categorical[:2])


def own(source, target, schema, cluster=None):
    with steps(visible=False) as step:
        return prepare_own(str(source), target, schema, step=step, cluster=cluster)


@pytest.mark.parametrize("bucket_rows", [262_144, 50])
def test_a_dirty_csv_log_gives_the_same_rows(cluster, tmp_path, monkeypatch, bucket_rows):
    source = made_up(tmp_path / "raw")
    one = own(source, tmp_path / "one", CSV_SCHEMA)
    monkeypatch.setattr(spark, "BUCKET_ROWS", bucket_rows)
    many = own(source, tmp_path / "many", CSV_SCHEMA, cluster)
    assert_same(tmp_path / "one", tmp_path / "many")
    assert one.source["duplicates_dropped"] == 24
    assert many.source["broken_lines"] == many.source["without_time"] == 3
    assert len(many.files) == (3 if bucket_rows > 1000 else pytest.approx(28, abs=5))


def parquet(folder, *, files=2, each=3000, group=500):
    random = np.random.default_rng(1)
    folder.mkdir()
    for number in range(files):
        moments = START_MS + random.integers(0, 2 * 86_400_000, each)
        table = pa.table(
            {
                "ts": pa.array(moments).cast(pa.timestamp("ms")).cast(pa.timestamp("us", tz="UTC")),
                "price": pa.array([None if i % 7 == 0 else float(i % 100) for i in range(each)]),
                "user": pa.array(random.integers(0, 2**40, each)),
                "country": pa.array([("de", None, "fr")[i % 3] for i in range(each)]),
                "tags": pa.array([[f"t{j}" for j in range(i % 4)] for i in range(each)]),
                "click": pa.array(random.integers(0, 2, each)),
            }
        )
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=group)
    return folder


def test_parts_of_parquet_files_give_the_same_rows(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("ranker.data.prepare.own.PIECE_ROWS", 1000)  # three tasks a file
    monkeypatch.setattr(spark, "PIECE_ROWS", 1000)
    source = parquet(tmp_path / "raw")
    own(source, tmp_path / "one", SCHEMA)
    own(source, tmp_path / "many", SCHEMA, cluster)
    assert_same(tmp_path / "one", tmp_path / "many")


def test_the_recipe_of_kuairand_gives_the_same_rows_of_its_published_files(cluster, tmp_path, kuairand_source):
    prepare("kuairand", kuairand_source, tmp_path / "one")
    prepare("kuairand", kuairand_source, tmp_path / "many", cluster=cluster)
    assert_same(tmp_path / "one", tmp_path / "many")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "many").rglob("*"))
    prepare("kuairand", kuairand_source, tmp_path / "many", cluster=cluster)  # is there already
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "many").rglob("*")) == before


def test_a_file_that_a_worker_cannot_read_is_named_in_one_line_and_no_day_is_visible(cluster, tmp_path):
    source = parquet(tmp_path / "raw")
    file = source / "part-1.parquet"
    raw = bytearray(file.read_bytes())
    raw[200:4000] = bytes(3800)
    file.write_bytes(bytes(raw))
    with pytest.raises(UserError, match=r"part-1\.parquet cannot be read") as caught:
        own(source, tmp_path / "new", SCHEMA, cluster)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"raw", ".new.lock"}


def test_days_that_are_written_are_not_visible_before_the_last_one_is(cluster, tmp_path, monkeypatch):
    source, target = parquet(tmp_path / "raw"), tmp_path / "new"

    def broken(rows):
        if rows["click"].sum() and rows["time_ms"][0] > START_MS + 86_400_000:
            raise UserError("the second day is broken")
        return rows

    monkeypatch.setattr("ranker.data.prepare.own._unchanged", broken)
    with pytest.raises(UserError, match="the second day is broken"):
        own(source, target, SCHEMA, cluster)
    assert not target.exists()
    monkeypatch.undo()
    assert own(source, target, SCHEMA, cluster).days == 2


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_visible_and_the_next_one_works(tmp_path):
    source, target = parquet(tmp_path / "raw", files=4, each=200_000, group=50_000), tmp_path / "new"
    SCHEMA.to_yaml(tmp_path / "schema.yaml")
    command = [sys.executable, "scripts/prepare_data.py", "log", str(source), str(target), "--quiet"]
    command += ["--schema", str(tmp_path / "schema.yaml"), "--engine", "spark", "--master", "local[2]"]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    draft = tmp_path / ".new.draft"
    while running.poll() is None and not list(draft.glob("staging-*/converted-*")):
        time.sleep(0.05)
    running.kill()
    running.wait()
    assert draft.exists()
    assert not target.exists()
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert not draft.exists()
    assert Manifest.read(target).source["rows_read"] == 800_000


def test_a_master_that_is_none_is_refused_in_one_line():
    code = (
        "from ranker.commands.data_commands import prepare\n"
        "raise SystemExit(prepare(['movielens', 'a', 'b', '--engine', 'spark', '--master', 'nowhere']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: Spark does not start on nowhere: ")
