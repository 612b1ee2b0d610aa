from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from ranker.data.prepare import download
from ranker.data.prepare.download import ARCHIVES, Archive, fetch, md5_of, unpack
from ranker.errors import UserError

ROOT = Path(__file__).parents[3]
BODY = bytes(range(256)) * 4_000  # about a megabyte


class Server(ThreadingHTTPServer):
    """Serves one body under every name; ``cut_after`` lists after how many bytes the next responses break off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = BODY
        self.ranges = True
        self.status = 0
        self.cut_after: list[int] = []
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.server.status:
            self.send_error(self.server.status)
            return
        body = self.server.body
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.server.ranges else 0  # type: ignore[index]
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + self.server.cut_after.pop(0) if self.server.cut_after else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def archive(server: Server, body: bytes = BODY, name: str = "thing.zip") -> Archive:
    digest = hashlib.md5(body, usedforsecurity=False).hexdigest()
    return replace(ARCHIVES["movielens-1m"], url=f"{server.url}/{name}", md5=digest)


def test_a_file_is_fetched_and_not_fetched_again(tmp_path: Path, server: Server) -> None:
    seen: list[tuple[int, int | None]] = []
    path = fetch(archive(server), tmp_path / "new", progress=lambda *state: seen.append(state))
    assert path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert fetch(archive(server), tmp_path / "new") == path
    assert server.asked == [None]


def test_a_cut_connection_is_resumed_where_it_broke(tmp_path: Path, server: Server) -> None:
    server.cut_after = [300_000, 200_000]
    path = fetch(archive(server), tmp_path, wait_s=0.0)
    assert path.read_bytes() == BODY
    assert server.asked == [None, "bytes=300000-", "bytes=500000-"]
    assert not list(tmp_path.glob("*.part"))


def test_what_an_earlier_run_left_is_gone_on_with(tmp_path: Path, server: Server) -> None:
    (tmp_path / "thing.zip.part").write_bytes(BODY[:1_000])
    assert fetch(archive(server), tmp_path).read_bytes() == BODY
    assert server.asked == ["bytes=1000-"]


def test_a_part_that_was_already_whole_is_taken(tmp_path: Path, server: Server) -> None:
    (tmp_path / "thing.zip.part").write_bytes(BODY)
    assert fetch(archive(server), tmp_path).read_bytes() == BODY


def test_a_server_without_ranges_starts_over(tmp_path: Path, server: Server) -> None:
    server.ranges = False
    server.cut_after = [300_000]
    assert fetch(archive(server), tmp_path, wait_s=0.0).read_bytes() == BODY


def test_it_gives_up_after_tries_that_bring_nothing_and_keeps_what_it_has(tmp_path: Path, server: Server) -> None:
    server.cut_after = [1_000, 0, 0, 0]
    with pytest.raises(UserError, match=r"after 3 tries; 1,000 bytes are kept in .*thing\.zip\.part"):
        fetch(archive(server), tmp_path, attempts=3, wait_s=0.0)
    assert (tmp_path / "thing.zip.part").read_bytes() == BODY[:1_000]


def test_a_wrong_checksum_removes_the_file(tmp_path: Path, server: Server) -> None:
    wanted = archive(server)
    server.body = b"<html>please log in</html>"
    with pytest.raises(UserError, match=f"expected {wanted.md5}"):
        fetch(wanted, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_told_at_once_and_a_sick_server_tried_again(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(UserError, match="answers 404"):
        fetch(archive(server), tmp_path)
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(UserError, match="after 2 tries"):
        fetch(archive(server), tmp_path, attempts=2, wait_s=0.0)
    assert len(server.asked) == 3


def test_a_full_disk_is_not_taken_for_a_broken_connection(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_receive", full)
    with pytest.raises(UserError, match="the disk is full at"):
        fetch(archive(server), tmp_path)


def zipped(files: dict[str, str]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as out:
        for name, text in files.items():
            out.writestr(name, text)
    return held.getvalue()


def test_archives_are_unpacked_once_and_whole(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({"ml-1m/ratings.dat": "1::2::3::4\n", "ml-1m/README": "terms"}))
    data = unpack(ARCHIVES["movielens-1m"], tmp_path / "a.zip", tmp_path)
    assert (data / "ratings.dat").read_text() == "1::2::3::4\n"
    (data / "ratings.dat").write_text("touched")
    assert unpack(ARCHIVES["movielens-1m"], tmp_path / "a.zip", tmp_path) == data
    assert (data / "ratings.dat").read_text() == "touched"
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as out:
        out.add(data / "ratings.dat", "KuaiRand-Pure/data/log.csv")
    assert (unpack(ARCHIVES["kuairand-pure"], tmp_path / "b.tar.gz", tmp_path) / "log.csv").read_text() == "touched"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["KuaiRand-Pure", "a.zip", "b.tar.gz", "ml-1m"]


def test_a_broken_or_foreign_archive_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "a.zip"
    broken.write_bytes(b"no zip at all")
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(ARCHIVES["movielens-1m"], broken, tmp_path)
    broken.write_bytes(zipped({"elsewhere/ratings.dat": ""}))
    with pytest.raises(UserError, match="has no folder ml-1m"):
        unpack(ARCHIVES["movielens-1m"], broken, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["a.zip"]


def test_a_member_that_points_outside_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as out:
        out.addfile(tarfile.TarInfo("../escaped"))
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(ARCHIVES["kuairand-pure"], tmp_path / "b.tar.gz", tmp_path / "in")
    assert not (tmp_path / "escaped").exists()


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("download_data", ROOT / "scripts" / "download_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_shows_the_licence_first_and_ends_with_the_command_to_train(
    tmp_path: Path,
    server: Server,
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.body = zipped({"ml-1m/ratings.dat": ""})
    known = {**ARCHIVES, "movielens-1m": archive(server, server.body, "ml-1m.zip")}
    monkeypatch.setattr("ranker.commands.data_commands.ARCHIVES", known)
    assert script.main(["movielens-1m", str(tmp_path), "--yes", "--mirror", server.url + "/"]) == 0
    told = capsys.readouterr().out
    assert told.index("redistribution") < told.index("data=movielens data.source=")
    assert (tmp_path / "ml-1m" / "ratings.dat").is_file()


def test_without_a_person_or_a_yes_nothing_is_fetched(
    tmp_path: Path, server: Server, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["kuairand-pure", str(tmp_path), "--mirror", server.url]) == 2
    said = capsys.readouterr()
    assert "CC BY-SA 4.0" in said.out
    assert said.err == "error: no terminal to accept the licence on; add --yes\n"
    assert server.asked == []


def test_every_archive_has_a_secure_address_and_a_checksum() -> None:
    assert set(ARCHIVES) == {"kuairand-pure", "kuairand-1k", "kuairand-27k", "movielens-1m", "movielens-32m"}
    for held in ARCHIVES.values():
        assert held.url.startswith("https://")
        assert re.fullmatch("[0-9a-f]{32}", held.md5)
    assert len({held.md5 for held in ARCHIVES.values()}) == len(ARCHIVES)


def test_the_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert md5_of(tmp_path / "x") == "900150983cd24fb0d6963f7d28e17f72"
