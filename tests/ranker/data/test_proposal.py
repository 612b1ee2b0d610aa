"""inspect_data.py RAW --propose: what is proposed for two logs can be trained on, and mistakes are one line."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from made_logs import START, write_messy_csv, write_raw_kuairand
from ranker.commands.data_commands import inspect, prepare
from ranker.data.column_roles import is_id
from ranker.data.parquet_log import ParquetLog
from ranker.data.raw_log import RawLog, profiled
from ranker.data.raw_values import as_integer, as_number, as_text, as_time_ms
from ranker.data.schema import Schema
from support import ROOT


def proposed(raw: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[Schema, list[str], str]:
    """The schema that is proposed for a log, the commands printed after it, and the file's text."""
    path = raw.parent / f"{raw.name.split('.')[0]}.yaml"
    assert inspect([str(raw), "--propose", str(path), *options]) == 0
    out = capsys.readouterr().out
    commands = [line.strip() for line in out.split("next, after a look at it:")[1].splitlines() if line.strip()]
    return Schema.from_yaml(path), commands, path.read_text()


def every_row(log: ParquetLog) -> int:
    """Reads all rows, which raises for one that cannot be used."""
    return len(log.read(0, log.num_rows))


def test_a_messy_csv_becomes_a_log_without_leaks_broken_lines_or_rows_twice(tmp_path, capsys):
    raw = write_messy_csv(tmp_path / "shop.csv")
    schema, commands, text = proposed(raw, capsys)
    assert (schema.time_column, schema.task_names) == ("Event Time", ["clicked", "dwell_seconds", "purchased"])
    kinds = {f.name: (f.hash_buckets, f.vocabulary) for f in schema.categorical}
    assert kinds.keys() == {"user_id", "item_id", "category", "is_member", "country"}
    assert kinds["category"] == (0, ("Büro", "food", "no", "toys"))
    assert kinds["item_id"] == (1000, ())
    (price,) = schema.dense
    assert (price.name, price.transform) == ("price", "log1p")
    assert price.fill_null == pytest.approx(20, abs=2)
    assert schema.tasks[1].transform == "log1p"
    for name in ("checkout_total: it alone predicts purchased", "session_uuid: another value", "note: free text"):
        assert f"# - {name}" in text
    assert shlex.split(commands[0])[1:] == shlex.split(
        f"scripts/prepare_data.py log {raw} {tmp_path / 'shop_log'} --schema {tmp_path / 'shop.yaml'}"
    )
    assert prepare([*shlex.split(commands[0])[2:], "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "dropped 8 exact duplicates" in told
    assert "left out: 1 in shop.csv" in told
    assert "1 rows without a readable time" in told
    log = ParquetLog(str(tmp_path / "shop_log"))
    assert every_row(log) == 4000
    raw_rows = pl.read_csv(raw, separator=";", infer_schema=False, truncate_ragged_lines=True).head(-2).unique()
    stored = pl.read_parquet(tmp_path / "shop_log" / "*.parquet")
    clicks = raw_rows["clicked"].cast(pl.Int64).sum()
    assert stored["clicked"].sum() == clicks
    prices = raw_rows["price"].str.replace_all(",", "").cast(pl.Float64, strict=False)
    assert stored["price"].sum() == pytest.approx(prices.sum())
    assert stored["price"].null_count() == prices.null_count() > 0


def test_parquet_in_order_is_trained_on_where_it_lies(tmp_path, capsys):
    raw = write_raw_kuairand(tmp_path / "kr")
    schema, commands, text = proposed(raw, capsys)
    assert (schema.time_column, schema.time_unit) == ("time_ms", "ms")
    assert schema.task_names == ["is_click", "is_like", "long_view", "play_time_ms"]
    assert (schema.tasks[3].scale, schema.tasks[3].transform) == (0.001, "log1p")
    by_name = {f.name: f for f in schema.categorical}
    assert by_name["video_history"].table == "video_id"
    assert by_name["video_history"].kind == "sequence"
    assert by_name["tab"].vocabulary == tuple(range(8))
    assert {f.name: f.transform for f in schema.dense} == {
        "hourmin": "none",
        "duration_ms": "log1p",
        "follow_user_num": "log1p",
    }
    for name in ("date: a day", "is_rand: the same", "is_follow: the same"):
        assert f"# - {name}" in text
    assert commands[0] == f"cp {tmp_path / 'kr.yaml'} {raw / 'schema.yaml'}"
    (raw / "schema.yaml").write_text(text)
    assert every_row(ParquetLog(str(raw))) == 6000


def spoiled(folder: Path, change: str) -> Path:
    """Kuairand's columns in one file, with something that cannot be trained on as it is."""
    write_raw_kuairand(folder, rows=1500)
    table = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    for file in folder.glob("*.parquet"):
        file.unlink()
    frame = pl.DataFrame(pl.from_arrow(table))
    r = np.random.default_rng(0)
    changes = {
        "unsorted": lambda f: f.sample(fraction=1.0, shuffle=True, seed=0),
        "nan": lambda f: f.with_columns(follow_user_num=pl.Series(np.where(r.random(len(f)) < 0.05, np.nan, 3.5))),
        "float ids": lambda f: f.with_columns(pl.col("video_id").cast(pl.Float64)),
        "text numbers": lambda f: f.with_columns(pl.col("duration_ms").cast(pl.String)),
        "no time": lambda f: f.with_columns(time_ms=pl.when(pl.int_range(pl.len()) % 9 > 0).then(pl.col("time_ms"))),
        "text times": lambda f: f.with_columns(
            time_ms=pl.from_epoch("time_ms", time_unit="ms").dt.strftime("%d/%m/%Y %H:%M:%S")
        ),
    }
    changes[change](frame).write_parquet(folder / "all.parquet")
    return folder


@pytest.mark.parametrize(
    ("change", "reason", "rows"),
    [
        ("unsorted", "not in the order of 'time_ms'", 1500),
        ("nan", "'follow_user_num' holds NaN", 1500),
        ("float ids", "the ids in 'video_id' are written as double", 1500),
        ("text numbers", "the numbers in 'duration_ms' are written as texts", 1500),
        ("no time", "of the rows have no time", 1333),
        ("text times", "the times in 'time_ms' are written as", 1500),
    ],
)
def test_what_cannot_be_trained_on_as_it_is_is_converted_and_the_reason_is_said(tmp_path, capsys, change, reason, rows):
    raw = spoiled(tmp_path / "kr", change)
    path = tmp_path / "s.yaml"
    assert inspect([str(raw), "--propose", str(path)]) == 0
    assert reason in capsys.readouterr().out
    assert prepare(["log", str(raw), str(tmp_path / "log"), "--schema", str(path), "--quiet"]) == 0
    log = ParquetLog(str(tmp_path / "log"))
    assert every_row(log) == rows
    times = log.read(0, rows).time_ms_B.numpy()
    assert (np.diff(times) >= 0).all()
    assert START * 1000 <= times[0] < times[-1] < (START + 4 * 86_400) * 1000


def test_the_user_chooses_time_and_tasks(tmp_path, capsys):
    raw = write_raw_kuairand(tmp_path / "kr")
    schema, *_ = proposed(raw, capsys, "--tasks", "long_view", "--time", "time_ms")
    assert schema.task_names == ["long_view"]
    assert not {"is_click", "play_time_ms", "is_like"} & set(schema.feature_columns()), "other outcomes are no features"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tasks", "is_clicked"], "has no column 'is_clicked'; did you mean 'is_click'"),
        (["--tasks", "user_active_degree"], "cannot be a task: it holds string values"),
        (["--time", "tab"], "column 'tab' cannot be read as a time"),
        (["--time", "when"], "has no column 'when'"),
    ],
)
def test_a_wrong_choice_is_one_line(tmp_path, capsys, options, told):
    raw = write_raw_kuairand(tmp_path / "kr", rows=900)
    assert inspect([str(raw), "--propose", str(tmp_path / "s.yaml"), *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"1,2,3\n4,5,6\n", "holds numbers; put the names"),
        (b"a,a\n1,2\n", "column 'a' is there 2 times"),
        (b"time,click\n", "has no rows"),
        (b"user,click\nx,1\n", "no column of .* looks like a time"),
        (b"time,x\n2026-01-01,1\n2026-01-02,2\n", "name what to predict with --tasks"),
    ],
)
def test_a_csv_that_is_no_log_is_refused_in_one_line(tmp_path, capsys, content, told):
    (tmp_path / "x.csv").write_bytes(content)
    assert inspect([str(tmp_path / "x.csv"), "--propose", str(tmp_path / "s.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert pl.Series([error]).str.contains(told)[0], error


def test_files_of_other_tables_and_an_existing_schema_are_refused(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.csv").write_text("time,click\n2026-01-01,1\n")
    (tmp_path / "logs" / "users.csv").write_text("user,age\nx,1\n")
    (tmp_path / "s.yaml").write_text("mine")
    assert inspect([str(tmp_path / "logs"), "--propose", str(tmp_path / "new.yaml")]) == 2
    assert "have different columns" in capsys.readouterr().err
    assert inspect([str(tmp_path / "logs" / "a.csv"), "--propose", str(tmp_path / "s.yaml")]) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err


def test_encodings_delimiters_and_compression_are_read(tmp_path):
    import gzip

    text = "time\tname\n2026-01-01\tMüller\n2026-01-02\t-\n"
    (tmp_path / "a.tsv").write_bytes(text.encode("cp1252"))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.replace("\t", "|").encode()))
    for name in ("a.tsv", "b.csv.gz"):
        log = RawLog.open(str(tmp_path / name))
        profile = profiled(log)
        assert list(profile.columns) == ["time", "name"]
        assert profile.sample["name"].to_pylist() == ["Müller", None]


@pytest.mark.parametrize(
    ("name", "id_"),
    [("item_views", False), ("user_clicks_7d", False), ("item_id", True), ("user", True), ("n_likes", False)],
)
def test_how_often_something_happened_is_no_name_of_it(tmp_path, name, id_):
    rows = "\n".join(f"2026-03-01 10:{i % 60:02}:00,{i * 7}" for i in range(400))
    (tmp_path / "log.csv").write_text(f"time,{name}\n{rows}\n")
    profile = profiled(RawLog.open(str(tmp_path)))
    assert is_id(name, profile.columns[name]) is id_


def test_texts_become_numbers_ids_and_times():
    frame = pl.DataFrame(
        {
            "t": ["2026-11-23T08:30:00Z", "2026-11-23 08:30", "2026-11-23T09:30:00.5+01:00", "2026-11-23", "later"],
            "n": ["1,234.5", " 7", "yes", "-.5e1", "12 apples"],
            "i": ["9007199254740993", "7.0", "7.5", "1,000", ""],
            "s": [" a ", "", "b", None, "  "],
        }
    )
    made = frame.select(
        as_time_ms("t", pl.String(), "iso"), as_number("n", pl.String()), as_integer("i", pl.String()), as_text("s")
    )
    moment = 1_795_422_600_000
    assert made["t"].to_list() == [moment, moment, moment + 500, 1_795_392_000_000, None]
    assert made["n"].to_list() == [1234.5, 7.0, 1.0, -5.0, None]
    assert made["i"].to_list() == [9007199254740993, 7, None, 1000, None]
    assert made["s"].to_list() == ["a", None, "b", None, None]
    for how, value in (("s", 1_795_422_600), ("us", 1_795_422_600_000_000)):
        assert pl.DataFrame({"t": [value]}).select(as_time_ms("t", pl.Int64(), how))["t"][0] == moment


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_first_five_minutes_of_a_new_user(tmp_path, kind):
    """The printed commands as they are, each in its own process, up to a trained model."""
    raw = write_messy_csv(tmp_path / "shop.csv") if kind == "csv" else write_raw_kuairand(tmp_path / "kr")

    def call(command: str) -> str:
        words = shlex.split(command)
        words = [sys.executable, str(ROOT / words[1]), *words[2:]] if words[0] == "python" else words
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    out = call(f"python scripts/inspect_data.py {raw.name} --propose s.yaml")
    first, train, _ = [line.strip() for line in out.split("next, after a look at it:")[1].strip().splitlines()]
    call(first)
    told = call(f"{train} logger=csv trainer=cpu")
    assert "completed" in told
