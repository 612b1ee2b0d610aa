"""Notices that a rank of a distributed run has ended or stopped, and ends the others with one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

BEAT_SECONDS = 1.0
GRACE_SECONDS = 5.0  # for the main thread to end by itself, which writes the summary

Address = tuple[str, int]


class RankWatch:
    """A thread of each rank. Ranks send beats to rank 0 by UDP, and rank 0 answers them.

    A rank that was heard of and is silent for too long is lost: its process is stopped, or its machine is gone. Rank 0
    looks after the processes that it has started too, and these look whether rank 0 lives, which takes a second. A rank
    that is lost is kept in ``lost``. If the main thread does not end by itself, which it cannot while it waits in a
    collective call for a rank that is stopped, the watch says a line and ends the process with status 1.

    The suspension of a whole run, as by Ctrl-Z, is no silence: a thread that was itself suspended starts to wait anew.

    Args:
        rank: number of this process.
        timeout: seconds of silence after which a rank is lost.
        children: processes that this one has started: ranks 1, 2, ...
        parent: process that has started this one; None if another program did.
        advice: how to go on, as the end of the line.

    Attributes:
        lost: which rank is lost, and how; None while none is.
        port: where this rank listens.
    """

    def __init__(
        self,
        rank: int,
        *,
        timeout: float,
        children: Sequence[subprocess.Popen[bytes]] = (),
        parent: int | None = None,
        advice: Callable[[], str] = str,
    ) -> None:
        self.lost: str | None = None
        self._rank, self._timeout, self._children, self._parent = rank, timeout, children, parent
        self._advice = advice
        self._heard: dict[int, float] = {}  # when, by rank
        self._beat = min(BEAT_SECONDS, timeout / 10)
        self._done = threading.Event()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        self.port = int(self._socket.getsockname()[1])
        self._first: Address | None = None

    def start(self) -> None:
        """Starts the thread. It looks after processes of this machine until ``connect``."""
        threading.Thread(target=self._run, daemon=True, name="rank-watch").start()

    def connect(self, first: Address) -> None:
        """Begins to send beats, the first one now: a rank that stops before it was heard of is not watched.

        Args:
            first: where rank 0 listens.
        """
        self._first = first
        with suppress(OSError):
            self._send()

    def end(self) -> None:
        """Ends the thread: the collective work is over."""
        self._done.set()

    def wait(self) -> str | None:
        """What was lost, if that is found out within some seconds. Other ranks wait to be ended by rank 0."""
        deadline = time.monotonic() + (6 if self._rank else 2) * GRACE_SECONDS
        while self.lost is None and time.monotonic() < deadline:
            time.sleep(0.1)
            self.lost = self.lost or self._ended_process()
        return self.lost

    def end_children(self) -> None:
        """Kills the processes that this one has started. A stopped process can be killed too."""
        for child in self._children:
            if child.poll() is None:
                child.kill()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._done.is_set() and self.lost is None:
            with suppress(OSError):
                self._exchange()
            now = time.monotonic()
            if now - last > 5 * self._beat:  # this process was suspended
                self._heard = dict.fromkeys(self._heard, now)
            last = now
            self.lost = self._ended_process() or self._silent(now)
        self._socket.close()
        if not self._done.wait(GRACE_SECONDS):
            self._end()

    def _exchange(self) -> None:
        """Sends a beat, and takes those of others for the time of one."""
        self._send()
        until = time.monotonic() + self._beat
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            content, sender = self._socket.recvfrom(16)
            self._heard[int(content)] = time.monotonic()
            if not self._rank:
                self._socket.sendto(b"0", sender)

    def _send(self) -> None:
        if self._rank and self._first:
            self._socket.sendto(str(self._rank).encode(), self._first)

    def _silent(self, now: float) -> str | None:
        for rank, heard in self._heard.items():
            if now - heard > self._timeout:
                return (
                    f"rank {rank} has not answered for {self._timeout:g} seconds: its process is stopped, or its "
                    "machine cannot be reached"
                )
        return None

    def _ended_process(self) -> str | None:
        for rank, child in enumerate(self._children, start=1):
            status = child.poll()
            if status:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return f"rank {rank} {how}"
        if self._parent is not None and os.getppid() != self._parent:
            return "rank 0 ended"
        return None

    def _end(self) -> None:
        if self._rank <= 1:  # rank 0 speaks; if it is lost, which the others are told of alone, rank 1
            with suppress(OSError, ValueError):
                print(f"error: {self.lost}; go on with: {self._advice()}", file=sys.stderr, flush=True)
        self.end_children()
        if self._parent is not None and os.getppid() == self._parent:  # it is stopped
            with suppress(OSError):
                os.kill(self._parent, signal.SIGKILL)
        os._exit(1)
