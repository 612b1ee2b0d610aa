"""What a watch finds out: a process that has ended, a rank that is silent, and when it finds nothing."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

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
        watch.connect(("127.0.0.1", watches[0].port), token=watches[0].token)
    yield watches
    for watch in watches:
        watch.end()


def test_ranks_that_hear_each_other_lose_nobody(pair: tuple[RankWatch, RankWatch]) -> None:
    first, second = pair

    assert until_lost(first, 3 * TIMEOUT) is None
    assert second.lost is None


def said_by(rank: int, watch: RankWatch) -> socket.socket:
    """A connection to rank 0 that a program opens, in place of a rank's watch."""
    connection = socket.create_connection(("127.0.0.1", watch.port))
    connection.sendall(f"{watch.token} {rank} elsewhere\n".encode())
    return connection


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[RankWatch]:
    """The watch of rank 0, which would give up a silent rank after ten minutes."""
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)
    watch = RankWatch(0, timeout=600)
    watch.start()
    yield watch
    watch.end()


def test_a_silent_rank_is_named_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)
    watch = RankWatch(0, timeout=TIMEOUT)
    watch.start()
    try:
        with said_by(1, watch):
            lost = until_lost(watch, 10 * TIMEOUT)
    finally:
        watch.end()

    assert lost is not None
    assert lost.startswith("rank 1 has not answered for 1 seconds")


def test_a_silent_first_rank_is_named_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)
    watch = RankWatch(1, timeout=TIMEOUT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch.start()
        watch.connect(server.getsockname(), token="t")
        accepted, _ = server.accept()
        try:
            with accepted:
                lost = until_lost(watch, 10 * TIMEOUT)
        finally:
            watch.end()

    assert lost is not None
    assert lost.startswith("rank 0 has not answered for 1 seconds")


def test_a_rank_whose_process_dies_on_another_machine_is_lost_at_once_and_the_others_are_told(first: RankWatch) -> None:
    third = RankWatch(2, timeout=600)
    third.start()
    third.connect(("127.0.0.1", first.port), token=first.token)
    try:
        start = time.monotonic()
        said_by(1, first).close()

        assert until_lost(first, 20) == "rank 1 (on elsewhere) was killed, or its machine failed"
        assert until_lost(third, 20) == "rank 1 (on elsewhere) was killed, or its machine failed"
        assert time.monotonic() - start < 20
        assert first.speaks
        assert not third.speaks
    finally:
        third.end()


def test_the_death_of_the_first_rank_is_said_by_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)
    watches = [RankWatch(rank, timeout=600) for rank in (1, 2)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        for watch in watches:
            watch.start()
            watch.connect(server.getsockname(), token="t")
            server.accept()[0].close()
    try:
        assert [until_lost(watch, 20) for watch in watches] == ["rank 0 was killed, or its machine failed"] * 2
        assert [watch.speaks for watch in watches] == [True, False]
    finally:
        for watch in watches:
            watch.end()


def test_a_farewell_is_no_loss_and_an_error_is_one_with_its_reason(first: RankWatch) -> None:
    second, third = RankWatch(1, timeout=600), RankWatch(2, timeout=600)
    for watch in (second, third):
        watch.start()
        watch.connect(("127.0.0.1", first.port), token=first.token)
    time.sleep(0.3)
    second.end()
    assert until_lost(first, 1.5) is None

    third.end("failed no room on\nthe disk")

    lost = until_lost(first, 20)
    assert lost is not None
    assert re.fullmatch(r"rank 2 \(on .+\) failed: no room on the disk", lost)


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"wrong 1 elsewhere\n", b"x" * 10_000])
def test_a_stranger_who_connects_is_not_heard(first: RankWatch, content: bytes) -> None:
    with socket.create_connection(("127.0.0.1", first.port)) as stranger:
        with suppress(OSError):
            stranger.sendall(content + b"failed for no reason\n")
        assert until_lost(first, 1.5) is None


def test_a_rank_that_stops_right_after_it_has_connected_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 1e6)
    first, second = RankWatch(0, timeout=TIMEOUT), RankWatch(1, timeout=TIMEOUT)
    first.start()
    try:
        second.connect(("127.0.0.1", first.port), token=first.token)  # its thread does not run

        lost = until_lost(first, 10 * TIMEOUT)
    finally:
        first.end()
        second.end()

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


def test_a_process_that_ends_after_its_farewell_is_lost_only_to_who_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal ends all ranks, each with its status, and one of them has files to write."""
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 5.0)
    child = subprocess.Popen([sys.executable, "-c", "import sys; input(); sys.exit(143)"], stdin=subprocess.PIPE)
    watch = RankWatch(0, timeout=600, children=[child])
    watch.start()
    try:
        with said_by(1, watch) as connection:
            connection.sendall(b"bye\n")
            child.communicate(b"\n")
            assert until_lost(watch, 2.5) is None
        assert watch.wait() == "rank 1 ended with status 143"
    finally:
        watch.end()


def test_the_first_rank_may_end_after_its_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 5.0)
    watch = RankWatch(1, timeout=600, parent=2**22 + 1)  # no process has this number
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch.connect(server.getsockname(), token="t")
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"bye\n")
            watch.start()
            try:
                assert until_lost(watch, 2.5) is None
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
