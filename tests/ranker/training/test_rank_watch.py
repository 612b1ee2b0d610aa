"""What a watch finds out: a process that has ended, a rank that is silent, and when it finds nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from ranker.training import rank_watch
from ranker.training.rank_watch import RankWatch

TIMEOUT = 1.0


def until_lost(watch: RankWatch, seconds: float) -> str | None:
    deadline = time.monotonic() + seconds
    while watch.lost is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return watch.lost


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RankWatch, RankWatch]]:
    """The watches of two ranks that hear each other."""
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)  # else the test's process would end
    watches = RankWatch(0, timeout=TIMEOUT), RankWatch(1, timeout=TIMEOUT)
    for watch in watches:
        watch.start()
        watch.connect(("127.0.0.1", watches[0].port))
    yield watches
    for watch in watches:
        watch.end()


def test_ranks_that_hear_each_other_lose_nobody(pair: tuple[RankWatch, RankWatch]) -> None:
    first, second = pair

    assert until_lost(first, 3 * TIMEOUT) is None
    assert second.lost is None


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_is_named_by_the_other(pair: tuple[RankWatch, RankWatch], silent: int) -> None:
    time.sleep(0.5)  # they must have heard of each other
    pair[silent].end()

    lost = until_lost(pair[1 - silent], 10 * TIMEOUT)

    assert lost is not None
    assert lost.startswith(f"rank {silent} has not answered for 1 seconds")


def test_a_rank_that_stops_right_after_it_has_connected_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)
    first, second = RankWatch(0, timeout=TIMEOUT), RankWatch(1, timeout=TIMEOUT)
    first.start()
    try:
        second.connect(("127.0.0.1", first.port))  # its thread does not run

        lost = until_lost(first, 10 * TIMEOUT)
    finally:
        first.end()
        second.end()
        second.start()  # closes its socket

    assert lost is not None
    assert lost.startswith("rank 1 has not answered for 1 seconds")


def test_a_rank_that_was_never_heard_of_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)
    alone = RankWatch(0, timeout=0.3)
    alone.start()
    try:
        assert until_lost(alone, 1.5) is None
    finally:
        alone.end()


@pytest.mark.parametrize(
    ("code", "said"), [("sys.exit(3)", "ended with status 3"), ("os.kill(os.getpid(), 9)", "was killed by SIGKILL")]
)
def test_a_process_that_has_ended_is_named(monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)
    child = subprocess.Popen([sys.executable, "-c", f"import os, sys; {code}"])
    watch = RankWatch(0, timeout=600, children=[child])
    watch.start()
    try:
        assert until_lost(watch, 30) == f"rank 1 {said}"
    finally:
        watch.end()


def test_a_process_that_ended_well_is_not_lost() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    watch = RankWatch(0, timeout=600, children=[child])
    watch.start()
    try:
        assert until_lost(watch, 1.5) is None
    finally:
        watch.end()


def test_the_death_of_the_process_that_started_this_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)
    watch = RankWatch(1, timeout=600, parent=2**22 + 1)  # no process has this number
    watch.start()
    try:
        assert until_lost(watch, 30) == "rank 0 ended"
    finally:
        watch.end()
