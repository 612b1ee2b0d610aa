"""Daily training on a log in an object store: new days, markers, and late files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daily_log import name_of, words_for, write_day, write_log
from ranker.commands.daily_command import daily


@pytest.fixture
def memory() -> Iterator[tuple[str, Any]]:
    """A URL, and what copies a file to it."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")

    def put(path: Path, name: str) -> None:
        store.makedirs("/daily/log", exist_ok=True)
        store.put(str(path), f"/daily/log/{name}")

    yield "memory://daily/log", put
    store.rm("/daily", recursive=True)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    server_module = pytest.importorskip("moto.server")
    from pyarrow import fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    options = {
        "endpoint_override": f"127.0.0.1:{server.get_host_and_port()[1]}",
        "scheme": "http",
        "region": "us-east-1",
    }
    store = fs.S3FileSystem(allow_bucket_creation=True, **options)
    store.create_dir("daily")

    def put(path: Path, name: str) -> None:
        fs.copy_files(str(path), f"daily/log/{name}", destination_filesystem=store)

    yield "s3://daily/log?" + "&".join(f"{key}={value}" for key, value in options.items()), put
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("where", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_days_of_an_object_store(
    where: str, jobs: Any, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str],
    easy_gate: None,
) -> None:  # fmt: skip
    url, put = request.getfixturevalue(where)
    local = write_log(tmp_path / "log", 2)
    put(local / "schema.yaml", "schema.yaml")
    marker = tmp_path / "marker"
    marker.touch()
    for day in range(2):
        put(local / f"day={name_of(day)}.parquet", f"day={name_of(day)}/part.parquet")
    words = [word for word in words_for(tmp_path) if not word.startswith("data.source=")]
    words += [f"data.source='{url}'", "daily.complete=marker"]
    assert daily(words, jobs=jobs) == 0
    assert f"no day={name_of(0)}/_SUCCESS yet" in capsys.readouterr().out
    assert jobs.trained == []
    for day in range(2):
        put(marker, f"day={name_of(day)}/_SUCCESS")
    assert daily(words, jobs=jobs) == 0
    write_day(tmp_path / "other", 0, lambda rows: rows.tail(5))
    put(tmp_path / "other" / f"day={name_of(0)}.parquet", f"day={name_of(0)}/part.parquet")
    capsys.readouterr()
    assert daily(words, jobs=jobs) == 0
    assert f"{name_of(0)}: late: day={name_of(0)}/part.parquet came or changed" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "daily" / "days.jsonl").read_text().splitlines()]
    assert [(line["day"], line["verdict"]) for line in lines] == [(name_of(0), "promoted"), (name_of(0), "late")]
