from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest
import torch

from ranker.data import filesystem
from ranker.data.loader import WindowedLoader
from ranker.data.parquet_log import ParquetLog
from ranker.data.windows import plan_windows
from ranker.errors import UserError

DAYS = {0: 25, 1: 25, 2: 25}


def rows_of(log):
    plan = plan_windows(log, window=16, batch_size=4)
    return [batch.row_B.tolist() for batch in WindowedLoader(log, plan=plan, seed=1, num_workers=2)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(filesystem, "_FIRST_PAUSE_S", 0.001)


def test_a_file_url_is_the_local_directory(write_log):
    root = write_log(DAYS, manifest=True)
    assert rows_of(ParquetLog(f"file://{root}")) == rows_of(ParquetLog(str(root)))


def test_what_fsspec_knows_can_be_read(write_log):
    fsspec = pytest.importorskip("fsspec")
    root = write_log(DAYS)
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/bucket/log", recursive=True)
    log = ParquetLog("memory://bucket/log")
    assert rows_of(log) == rows_of(ParquetLog(str(root)))
    assert torch.equal(log.read(0, 75).onehot_BC, ParquetLog(str(root)).read(0, 75).onehot_BC)


@pytest.mark.parametrize("url", ["nosuch://bucket/log", "s3//bucket"])
def test_an_unknown_url_is_refused_in_one_line(url):
    with pytest.raises(UserError) as caught:
        ParquetLog(url)
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)


def test_a_remote_directory_without_data_is_named(write_log):
    pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=r"no schema\.yaml in memory://nowhere/log"):
        ParquetLog("memory://nowhere/log")


class Flaky:
    """A root whose first reads fail."""

    def __init__(self, failures, kind=ConnectionResetError):
        self.failures, self.kind = failures, kind

    def __call__(self):
        self.failures -= 1
        if self.failures >= 0:
            raise self.kind("connection reset\nby peer")
        return "read"


def remote_root():
    pytest.importorskip("fsspec")
    return filesystem.open_root("memory://bucket/log")


class ProtocolError(Exception):
    """An error as httpx raises it through fsspec. It is not an OSError."""


@pytest.mark.parametrize("kind", [ConnectionResetError, ProtocolError])
def test_a_failure_is_tried_again_a_few_times(kind):
    assert remote_root().retried(Flaky(3, kind), what="reading x") == "read"


@pytest.mark.parametrize("kind", [ConnectionResetError, ProtocolError])
def test_a_failure_that_stays_says_what_failed_and_how_often(kind):
    with pytest.raises(UserError, match="reading x failed 4 times, last with: connection reset by peer"):
        remote_root().retried(Flaky(4, kind), what="reading x")


def test_what_is_no_failure_of_the_file_system_is_left_alone(tmp_path):
    with pytest.raises(pa.ArrowInvalid):  # for example a damaged file
        remote_root().retried(Flaky(1, pa.ArrowInvalid), what="reading x")
    with pytest.raises(ProtocolError):  # on a local file system this is a bug
        filesystem.open_root(str(tmp_path)).retried(Flaky(1, ProtocolError), what="reading x")


def test_a_missing_file_and_a_local_failure_are_not_tried_again(tmp_path):
    def missing():
        calls.append(1)
        raise FileNotFoundError("no such key")

    calls: list[int] = []
    with pytest.raises(UserError, match="reading x failed: no such key"):
        remote_root().retried(missing, what="reading x")
    assert len(calls) == 1
    with pytest.raises(UserError, match="reading x failed: connection reset"):
        filesystem.open_root(str(tmp_path)).retried(Flaky(1), what="reading x")


class CuttingProxy:
    """Forwards TCP to a port. While ``cuts`` is above 0, it closes the connection during a large response."""

    def __init__(self, port: int) -> None:
        self.cuts = 0
        self.cut = 0
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", self._port))
            threading.Thread(target=self._pump, args=(client, upstream, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(upstream, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                passed += len(data)
                if answers and self.cuts > 0 and passed > 8192:
                    self.cuts -= 1
                    self.cut += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def s3(write_log, monkeypatch) -> Iterator[tuple[str, str, CuttingProxy]]:
    """A log on a local S3 server behind a proxy that can break connections: its local root, its URL, the proxy."""
    server_module = pytest.importorskip("moto.server")
    from pyarrow import fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    root = write_log({0: 4000, 1: 4000, 2: 1000}, row_group_size=2000)
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    proxy = CuttingProxy(server.get_host_and_port()[1])
    options = {"endpoint_override": f"127.0.0.1:{proxy.port}", "scheme": "http", "region": "us-east-1"}
    store = fs.S3FileSystem(allow_bucket_creation=True, **options)
    store.create_dir("bucket")
    fs.copy_files(str(root), "bucket/log", destination_filesystem=store)
    query = "&".join(f"{key}={value}" for key, value in options.items())
    yield str(root), f"s3://bucket/log?{query}", proxy
    proxy.close()
    server.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_log_on_s3_is_read_and_survives_connections_that_drop(s3):
    root, url, proxy = s3
    expected = ParquetLog(root).read(0, 9000)
    assert torch.equal(ParquetLog(url).read(0, 9000).row_B, expected.row_B)
    log = ParquetLog(url)
    proxy.cuts = 3
    batch = log.read(0, 9000)
    assert proxy.cut == 3
    assert torch.equal(batch.row_B, expected.row_B)
    assert torch.equal(batch.onehot_BC, expected.onehot_BC)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_connection_that_always_drops_says_what_failed(s3):
    _, url, proxy = s3
    log = ParquetLog(url)
    proxy.cuts = 10**9
    with pytest.raises(
        UserError, match=r"day=2022-04-25\.parquet, column '\w+', row group 0: reading failed 4 times"
    ) as caught:
        log.read(0, 10)
    assert "\n" not in str(caught.value)


def test_a_file_system_whose_package_is_missing_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ossfs", None)
    with pytest.raises(UserError, match=r"^oss://bucket/log: Install ossfs to access [\w ]+$"):
        ParquetLog("oss://bucket/log")
