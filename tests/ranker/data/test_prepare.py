from __future__ import annotations

import errno
import importlib.util
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from ranker.commands.data_commands import prepare as prepare_command
from ranker.data import prepare as package
from ranker.data.manifest import Manifest, sha256_of
from ranker.data.prepare import buckets, days, prepare, prepare_cached
from ranker.data.prepare.spark import file_names
from ranker.data.schema import Schema
from ranker.errors import UserError

ROOT = Path(__file__).parents[3]
DAY_S = 86_400
START_S = 978_307_200  # 2001-01-01 00:00 UTC


def ratings(folder: Path, *, rows: int = 60, repeated: int = 5) -> Path:
    """A small MovieLens in the later layout: three days, in the order of users, some rows twice."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{i % 7},{i % 11},{1 + i % 5}.0,{START_S + (i * 7_919) % (3 * DAY_S)}" for i in range(rows)]
    lines = sorted(lines) + lines[:repeated]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines) + "\n")
    films = [f"{i},Film {i} ({1950 + i}),Drama|War" for i in range(11)]
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "\n".join(films) + "\n")
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_prepared_folder_holds_days_a_schema_and_a_manifest_that_tells_the_truth(tmp_path: Path) -> None:
    manifest = prepare("movielens", ratings(tmp_path / "src"), tmp_path / "dst")
    assert [f.name for f in sorted((tmp_path / "dst").iterdir())] == [
        "day=2001-01-01.parquet",
        "day=2001-01-02.parquet",
        "day=2001-01-03.parquet",
        "manifest.json",
        "schema.yaml",
    ]
    assert manifest == Manifest.read(tmp_path / "dst")
    assert manifest.rows == 60
    assert manifest.source["rows_read"] == 65
    assert manifest.source["duplicates_dropped"] == 5
    schema = Schema.from_yaml(tmp_path / "dst" / "schema.yaml")
    for entry in manifest.files:
        frame = pl.read_parquet(tmp_path / "dst" / entry.path)
        assert len(frame) == entry.rows
        assert frame["time_ms"].is_sorted()
        assert (entry.time_min_ms, entry.time_max_ms) == (frame["time_ms"].min(), frame["time_ms"].max())
        assert frame["time_ms"].cast(pl.Datetime("ms")).dt.date().cast(pl.String).unique().to_list() == [
            entry.path[4:14]
        ]
        assert sha256_of(tmp_path / "dst" / entry.path) == entry.sha256
        assert entry.label_rates["like"] == pytest.approx((frame["rating"] >= 4).mean())
        assert entry.label_rates["rating"] == pytest.approx(frame["rating"].mean())
        assert set(frame.columns) == set(schema.columns())


def test_the_same_rows_in_another_order_give_the_same_files(tmp_path: Path) -> None:
    one, two = ratings(tmp_path / "one"), ratings(tmp_path / "two")
    header, *lines = (two / "ratings.csv").read_text().splitlines()
    (two / "ratings.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    prepare("movielens", one, tmp_path / "a")
    prepare("movielens", two, tmp_path / "b")
    a, b = everything(tmp_path / "a"), everything(tmp_path / "b")
    assert {n: v for n, v in a.items() if n != "manifest.json"} == {n: v for n, v in b.items() if n != "manifest.json"}


def test_many_small_buckets_give_the_same_rows_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ratings(tmp_path / "src", rows=500)
    prepare("movielens", source, tmp_path / "one")
    monkeypatch.setattr(buckets, "BUCKET_ROWS", 100)
    monkeypatch.setattr(buckets, "DEALT_ROWS", 64)
    many = prepare("movielens", source, tmp_path / "many")
    assert len(many.files) == 3
    for one, other in zip(Manifest.read(tmp_path / "one").files, many.files, strict=True):  # type: ignore[union-attr]
        # Row groups end where buckets do, so the bytes differ and nothing else.
        assert pl.read_parquet(tmp_path / "one" / one.path).equals(pl.read_parquet(tmp_path / "many" / other.path))
        assert one.label_rates == pytest.approx(other.label_rates)
        assert replace(one, sha256="", label_rates={}) == replace(other, sha256="", label_rates={})


def test_a_bucket_holds_whole_minutes_up_to_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_ROWS", 10)
    assert buckets.bucket_starts({1: 4, 2: 6, 3: 1, 7: 30, 8: 9, 9: 1}) == [1, 3, 7, 8]


def test_a_second_run_changes_nothing_and_a_changed_source_is_prepared_anew(tmp_path: Path) -> None:
    source, target = ratings(tmp_path / "src"), tmp_path / "dst"
    prepare("movielens", source, target)
    before = {f: f.stat().st_mtime_ns for f in target.iterdir()}
    prepare("movielens", source, target)
    assert before == {f: f.stat().st_mtime_ns for f in target.iterdir()}
    ratings(source, rows=90)
    assert prepare("movielens", source, target).rows == 90
    assert Manifest.read(target).rows == 90  # type: ignore[union-attr]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("broken")])
def test_an_interrupted_run_leaves_nothing_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    source, target, close = ratings(tmp_path / "src"), tmp_path / "out" / "dst", days._Day.entry
    calls = []

    def broken(day: days._Day) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise failure
        return close(day)

    with monkeypatch.context() as patched:
        patched.setattr(days._Day, "entry", broken)
        with pytest.raises(type(failure)):
            prepare("movielens", source, target)
    assert [f.name for f in target.parent.iterdir()] == [".dst.lock"]
    assert prepare("movielens", source, target).rows == 60


def test_a_failed_run_keeps_what_was_prepared_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = ratings(tmp_path / "src"), tmp_path / "dst"
    prepare("movielens", source, target)
    before = everything(target)
    ratings(source, rows=90)
    monkeypatch.setattr(days._Day, "add", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError):
        prepare("movielens", source, target)
    assert everything(target) == before


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".dst.draft"
    left.mkdir()
    (left / "day=1999-01-01.parquet").write_text("half a file")
    prepare("movielens", ratings(tmp_path / "src"), tmp_path / "dst")
    assert not left.exists()
    assert not (tmp_path / "dst" / "day=1999-01-01.parquet").exists()


def test_a_full_disk_is_said_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(days.pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match="the disk is full at"):
        prepare("movielens", ratings(tmp_path / "src"), tmp_path / "dst")
    assert sorted(f.name for f in tmp_path.iterdir()) == [".dst.lock", "src"]


def test_a_disk_that_fills_up_while_polars_writes_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = pl.LazyFrame.sink_parquet
    # /dev/full gives the system's own error in Polars' words.
    monkeypatch.setattr(pl.LazyFrame, "sink_parquet", lambda frame, _, **named: sink(frame, "/dev/full", **named))
    with pytest.raises(UserError, match="the disk is full at"):
        prepare("movielens", ratings(tmp_path / "src"), tmp_path / "dst")
    assert sorted(f.name for f in tmp_path.iterdir()) == [".dst.lock", "src"]


def test_preparing_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(buckets, "BUCKET_ROWS", 100)
    prepare("movielens", ratings(tmp_path / "src", rows=500), tmp_path / "dst", progress=True)
    shown = capsys.readouterr().err.splitlines()
    for words, count in (
        ("reading ratings.csv", "1/1"),
        ("dealing out by time", "505/505"),
        ("sorting and", "505/505"),
    ):
        assert any(words in line and count in line for line in shown), words
    prepare("movielens", ratings(tmp_path / "src", rows=90), tmp_path / "dst")
    assert not capsys.readouterr().err


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no prepared data"):
        prepare("movielens", ratings(tmp_path / "src"), tmp_path / "dst")
    assert everything(tmp_path / "dst") == {"thesis.tex": b"years of work"}


def test_the_cache_is_made_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ratings(tmp_path / "src")
    first = prepare_cached("movielens", source, tmp_path / "cache", progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(package, "write_days", lambda *_, **__: pytest.fail("prepared twice"))
        assert prepare_cached("movielens", source, tmp_path / "cache", progress=False) == first
    os.utime(source / "ratings.csv", ns=(1, 1))
    second = prepare_cached("movielens", source, tmp_path / "cache", progress=False)
    assert second != first
    monkeypatch.setattr("ranker.data.prepare.recipe.CODE_VERSION", 999)
    assert prepare_cached("movielens", source, tmp_path / "cache", progress=False) not in (first, second)


def test_a_cache_that_holds_the_data_need_not_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ratings(tmp_path / "src")
    made = prepare_cached("movielens", source, tmp_path / "cache", progress=False)
    monkeypatch.setattr(package, "locked", lambda _: pytest.fail("asked for the lock"))
    assert prepare_cached("movielens", source, tmp_path / "cache", progress=False) == made


def test_two_at_once_make_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, made, write_days = ratings(tmp_path / "src"), [], package.write_days
    together = threading.Barrier(2)

    def counted(*arguments: object, **named: object) -> object:
        made.append(1)
        return write_days(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(package, "write_days", counted)
    found: list[Path] = []

    def ask() -> None:
        together.wait()
        found.append(prepare_cached("movielens", source, tmp_path / "cache", progress=False))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found[0] == found[1]
    assert Manifest.read(found[0]).rows == 60  # type: ignore[union-attr]


def test_an_unknown_kind_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown data set 'kuairend'; did you mean 'kuairand'"):
        prepare("kuairend", tmp_path, tmp_path / "dst")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        prepare("kuairand", tmp_path / "nowhere", tmp_path / "dst")


def test_a_row_without_time_or_with_a_time_in_the_wrong_unit_is_refused(tmp_path: Path) -> None:
    source = ratings(tmp_path / "src")
    whole = (source / "ratings.csv").read_text()
    (source / "ratings.csv").write_text(whole + "1,1,3.0,\n")
    with pytest.raises(UserError, match="1 rows of the log have no time"):
        prepare("movielens", source, tmp_path / "dst")
    (source / "ratings.csv").write_text(whole + "1,1,3.0,978307\n")
    with pytest.raises(UserError, match="is it in seconds"):
        prepare("movielens", source, tmp_path / "dst")


def test_broken_and_empty_sources_are_refused_by_name(tmp_path: Path) -> None:
    source = ratings(tmp_path / "src")
    header = "userId,movieId,rating,timestamp\n"
    for text, message in (
        (header, "no rows"),
        ("", "ratings.csv is empty"),
        (header + "1,1,three,978307200\n", "ratings.csv cannot be read"),
        ("userId,movieId,stars,timestamp\n1,1,3,978307200\n", "ratings.csv has no column 'rating'"),
    ):
        (source / "ratings.csv").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            prepare("movielens", source, tmp_path / "dst")
        assert "\n" not in str(caught.value)


def test_the_script_prints_a_summary_and_turns_a_mistake_into_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "scripts" / "prepare_data.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    source, target = ratings(tmp_path / "src"), tmp_path / "dst"
    assert script.main(["movielens", str(source), str(target), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "60 rows in 3 days" in told
    assert "dropped 5 exact duplicates" in told
    assert "five_stars" in told
    assert script.main(["kuairand", str(source), str(target)]) == 2
    assert capsys.readouterr().err.startswith("error: the log is missing: no log_standard_*.csv in")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["movielens", "SRC", "DST", "--master", "local[2]"], "belong to --engine spark"),
        (["movielens", "SRC", "DST", "--engine", "spark", "--spark-conf", "memory"], "write KEY=VALUE"),
        (["rewrite", "SRC", "DST", "--engine", "spark"], "rewrite runs on this machine only"),
    ],
)
def test_options_of_spark_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], wanted: str
) -> None:
    with pytest.raises(SystemExit):
        prepare_command(options)
    assert wanted in capsys.readouterr().err


def test_without_pyspark_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.errors", None)
    assert prepare_command(["movielens", str(tmp_path), str(tmp_path / "dst"), "--engine", "spark"]) == 2
    assert "pip install 'evenkeel-ranker[spark]', and Java 17" in capsys.readouterr().err


def test_names_of_a_clusters_files_are_in_the_order_of_their_times() -> None:
    day = 19_107 * 1440  # slots of 2022-04-25
    assert [str(name) for name in file_names([day - 1, day, day + 700, day + 1440])] == [
        "day=2022-04-24/part-00000.parquet",
        "day=2022-04-25/part-00000.parquet",
        "day=2022-04-25/part-00001.parquet",
        "day=2022-04-26/part-00000.parquet",
    ]
    counts = {day - 1: 1, day: 1, day + 700: 5, day + 701: 5, day + 1440: 1}
    assert buckets.bucket_starts(counts, rows=8, within_days=True) == [day - 1, day, day + 701, day + 1440]
