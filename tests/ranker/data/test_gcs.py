"""``gs://`` through Arrow's own file system, against a server on localhost."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ranker.data import filesystem
from ranker.data.parquet_log import ParquetLog
from ranker.errors import UserError

SERVER = Path(__file__).with_name("gcs_server.py")


@pytest.fixture
def bucket(write_log, monkeypatch) -> Iterator[tuple[Path, str, int]]:
    """A log's local folder, the URL under which it is served, the server's port."""
    monkeypatch.setattr(filesystem, "_FIRST_PAUSE_S", 0.001)
    root = write_log({0: 600, 1: 600, 2: 300}, row_group_size=300)
    process = subprocess.Popen([sys.executable, str(SERVER), str(root)], text=True, stdout=subprocess.PIPE)
    with process:
        port = int(process.stdout.readline())
        endpoint = f"scheme=http&endpoint_override=127.0.0.1%3A{port}&retry_limit_seconds=1"
        yield root, f"gs://anonymous@b/log?{endpoint}", port
        process.kill()


def cuts(port: int, times: int) -> int:
    """Makes the next large responses break off. Returns the number that did so far."""
    return int(urllib.request.urlopen(f"http://127.0.0.1:{port}/cut?times={times}", timeout=10).read())


@pytest.mark.timeout(60)
def test_a_log_on_google_storage_is_read_and_survives_downloads_that_are_cut(bucket):
    root, url, port = bucket
    here = ParquetLog(str(root)).read(0, 1500)
    log = ParquetLog(url)
    cuts(port, 3)
    there = log.read(0, 1500)
    assert cuts(port, 0) == 3
    assert torch.equal(there.row_B, here.row_B)
    assert torch.equal(there.onehot_BC, here.onehot_BC)
    assert torch.equal(there.ragged["tags"].values, here.ragged["tags"].values)


@pytest.mark.timeout(60)
def test_an_object_that_is_gone_from_google_storage_is_named(bucket):
    root, url, _ = bucket
    log = ParquetLog(url)
    (root / "day=2022-04-26.parquet").unlink()
    with pytest.raises(
        UserError, match=r"day=2022-04-26\.parquet, column '\w+', row group 0: reading failed"
    ) as caught:
        log.read(600, 610)
    assert "\n" not in str(caught.value)
