"""``hf://`` through fsspec and huggingface_hub, against a server on localhost."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ranker.data.parquet_log import ParquetLog
from support import ROOT

pytest.importorskip("huggingface_hub", reason="hf:// needs huggingface_hub: pip install -e '.[dev]'")
SERVER = Path(__file__).with_name("hub_server.py")
URL = "hf://datasets/somebody/clicks/log"
# The hub's address is read when its package is imported: a process of its own.
READ = """
import sys
from ranker.data import filesystem
from ranker.data.parquet_log import ParquetLog
from ranker.errors import UserError
filesystem._FIRST_PAUSE_S = 0.001
try:
    log = ParquetLog(sys.argv[1])
    print("open", flush=True)
    input()
    batch = log.read(int(sys.argv[2]), int(sys.argv[3]))
    print(batch.row_B.tolist() + batch.onehot_BC.tolist() + batch.ragged["tags"].values.tolist())
except UserError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def hub(write_log) -> Iterator[tuple[Path, int]]:
    """A log's local folder, and the port on which the hub serves it."""
    root = write_log({0: 600, 1: 600, 2: 300}, row_group_size=300)
    process = subprocess.Popen([sys.executable, str(SERVER), str(root)], text=True, stdout=subprocess.PIPE)
    with process:
        yield root, int(process.stdout.readline())
        process.kill()


def reader(port: int, start: int, stop: int, home: Path) -> subprocess.Popen[str]:
    """Opens the log, prints a line, waits for a line, reads rows and prints them."""
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home)}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", READ, URL, str(start), str(stop)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def cuts(port: int, times: int) -> int:
    """Makes the next large responses break off. Returns the number that did so far."""
    return int(urllib.request.urlopen(f"http://127.0.0.1:{port}/cut?times={times}", timeout=10).read())


@pytest.mark.timeout(120)
def test_a_log_on_the_hub_is_read_and_survives_downloads_that_are_cut(hub, tmp_path):
    root, port = hub
    cuts(port, 3)
    there, errors = reader(port, 0, 1500, tmp_path).communicate("go\n")
    assert "error:" not in errors  # huggingface_hub says that it tries again
    assert cuts(port, 0) == 3
    here = ParquetLog(str(root)).read(0, 1500)
    expected = here.row_B.tolist() + here.onehot_BC.tolist() + here.ragged["tags"].values.tolist()
    assert there.splitlines()[1] == str(expected)


@pytest.mark.timeout(120)
def test_a_file_that_is_gone_from_the_hub_is_named_in_one_line(hub, tmp_path):
    root, port = hub
    process = reader(port, 600, 610, tmp_path)
    assert process.stdout.readline() == "open\n", process.communicate()
    (root / "day=2022-04-26.parquet").unlink()
    _, errors = process.communicate("go\n")
    assert "day=2022-04-26.parquet, column" in errors
    assert len(errors.strip().splitlines()) == 1
