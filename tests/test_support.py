"""What tests start ends with them."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import pytest

from support import end_processes, start


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="reads /proc")
def test_processes_that_a_test_leaves_are_ended_with_their_orphans() -> None:
    away = "start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
    code = f"import subprocess; print(subprocess.Popen(['sleep', '600'], {away}).pid)"
    orphan = int(start([sys.executable, "-c", code], os.environ).communicate()[0])
    waits = start([sys.executable, "-c", "input()"], os.environ, stdin=-1)
    assert Path(f"/proc/{orphan}/cmdline").read_bytes()

    end_processes()

    assert waits.returncode == -9
    status = Path(f"/proc/{orphan}/cmdline")
    assert not status.exists() or not status.read_bytes(), "it lives"  # a dead process may wait for its parent


def test_processes_that_tests_start_ignore_no_signal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        code = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)"
        assert start([sys.executable, "-c", code], os.environ).communicate()[0] == "True\n"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_garbage_collector_looks_through_what_tests_make_alone() -> None:
    assert gc.isenabled()
    assert gc.get_freeze_count() > 50_000, "what is imported is looked through again and again"
