"""Notices that a rank of a distributed run has ended or stopped, and ends the others with one line."""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

BEAT_SECONDS = 1.0
GRACE_SECONDS = 5.0  # for the main thread to end by itself, which writes the summary
_CONNECT_SECONDS = 10.0
_PATIENCE = 12  # times the grace, for a main thread that is ending
_LONGEST_LINE = 4096  # of what another process sends

Address = tuple[str, int]


@dataclass
class _Peer:
    """A connection to another rank. Rank 0 has one to each, the others have one to rank 0."""

    socket: socket.socket
    rank: int | None = None  # not known before its first line
    host: str = ""
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""


class RankWatch:
    """A thread of each rank. Ranks hold a TCP connection to rank 0, on which both sides send a beat every second.

    A rank that is silent for too long is lost: its process is stopped, or its machine is gone. A rank whose connection
    ends without a farewell is lost at once: the operating system closes the connections of a process that dies. Rank 0
    looks after the processes that it has started too, and these look whether rank 0 lives. One that ends after its
    farewell, with the status of a signal for example, is not lost: this rank has work left for a while, and no call
    that waits for the other.
    Which rank is lost, and how, is kept in ``lost``, and rank 0 tells the others. If the main thread does not end by
    itself, which it cannot while it waits in a collective call, the watch says a line and ends the process with
    status 1.

    The suspension of a whole run, as by Ctrl-Z, is no silence: a thread that was itself suspended starts to wait anew.
    A rank that never had a connection is not watched.

    Args:
        rank: number of this process.
        timeout: seconds of silence after which a rank is lost.
        children: processes that this one has started: ranks 1, 2, ...
        parent: process that has started this one; None if another program did.
        advice: how to go on, as the end of the line.

    Attributes:
        lost: which rank is lost, and how; None while none is.
        port: where this rank listens.
        token: what a connection must begin with; a secret of this run.
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
        self._beat = min(BEAT_SECONDS, timeout / 10)
        self._told = False  # by rank 0, which speaks
        self._done, self._alive = threading.Event(), threading.Event()
        self._selector = selectors.DefaultSelector()
        dual = socket.has_dualstack_ipv6()
        self._server = socket.create_server(
            ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
        )
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        self.port, self.token = int(self._server.getsockname()[1]), secrets.token_hex(8)
        self._peers: list[_Peer] = []
        self._left: dict[int, float] = {}  # when a rank said farewell
        self._lock = threading.Lock()  # of the peers
        self._thread = threading.Thread(target=self._run, daemon=True, name="rank-watch")

    @property
    def speaks(self) -> bool:
        """Whether this rank says the line: rank 0, or rank 1 if rank 0 is lost, which the others are not told of."""
        return self._rank == 0 or (self._rank == 1 and not self._told)

    def start(self) -> None:
        """Starts the thread. It looks after processes of this machine until ``connect``."""
        self._thread.start()

    def connect(self, first: Address, *, token: str) -> None:
        """Connects to rank 0. Where that fails, as behind a firewall, this rank is not watched.

        Args:
            first: where rank 0 listens.
            token: rank 0's.
        """
        if self._rank == 0:
            return
        with suppress(OSError):
            connection = socket.create_connection(first, timeout=_CONNECT_SECONDS)
            connection.sendall(f"{token} {self._rank} {socket.gethostname()}\n".encode())
            connection.setblocking(False)
            with self._lock:
                self._peers.append(_Peer(connection, rank=0, host=first[0]))
                self._selector.register(connection, selectors.EVENT_READ, self._peers[-1])

    def end(self, farewell: str = "bye") -> None:
        """Ends the thread: the collective work is over.

        Args:
            farewell: what the others are told. ``bye``, or ``failed REASON`` in a rank that ends because of an error.
        """
        self._say(f"lost {self.lost}" if self.lost is not None and self._rank == 0 else farewell)
        self._done.set()
        if not self._thread.is_alive():
            self._close()

    def alive(self) -> None:
        """Says that the main thread is about to end by itself, so that the watch does not end the process."""
        self._alive.set()

    def wait(self) -> str | None:
        """What was lost, if that is found out within some seconds. Other ranks wait to be told by rank 0."""
        deadline = time.monotonic() + (6 if self._rank else 2) * GRACE_SECONDS
        while self.lost is None and time.monotonic() < deadline:
            time.sleep(0.1)
            self.lost = self.lost or next(iter(self._ended_processes().values()), None)
        return self.lost

    def end_children(self) -> None:
        """Kills the processes that this one has started. A stopped process can be killed too."""
        for child in self._children:
            if child.poll() is None:
                child.kill()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._done.is_set() and self.lost is None:
            self._say("beat")
            ended = self._ended_processes()  # before their last words are read
            self._listen()
            now = time.monotonic()
            with self._lock:
                peers = list(self._peers)
            if now - last > 5 * self._beat:  # this process was suspended
                for peer in peers:
                    peer.heard = now
            last = now
            self.lost = self.lost or self._without_farewell(ended) or self._silent(peers, now)
        if self.lost is not None and self._rank == 0:
            self._say(f"lost {self.lost}")
        lost_at = time.monotonic()
        while not self._done.wait(min(self._beat, GRACE_SECONDS)):
            if time.monotonic() - lost_at > GRACE_SECONDS * (_PATIENCE if self._alive.is_set() else 1):
                break
        self._close()
        if not self._done.is_set():
            self._end()

    def _close(self) -> None:
        with self._lock:
            if self._selector.get_map() is None:
                return
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()
            self._peers.clear()

    def _say(self, line: str) -> None:
        """Sends a line to all peers. One whose buffer is full is stopped: it will be silent."""
        with self._lock:
            for peer in self._peers:
                with suppress(OSError):
                    peer.socket.send(" ".join(line.split()).encode()[: _LONGEST_LINE - 1] + b"\n")

    def _listen(self) -> None:
        """Takes connections and lines for the time of one beat, or until a rank is lost."""
        until = time.monotonic() + self._beat
        while (left := until - time.monotonic()) > 0 and self.lost is None and not self._done.is_set():
            for key, _ in self._selector.select(left):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer) -> None:
        try:
            content = peer.socket.recv(_LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:  # the connection was reset
            content = b""
        *lines, peer.unread = (peer.unread + content).split(b"\n")
        for line in lines:
            self._take(peer, line.decode(errors="replace"))
        if not content or len(peer.unread) > _LONGEST_LINE:
            if peer in self._peers:  # no farewell
                self.lost = self.lost or self._just_ended() or f"{_name(peer)} was killed, or its machine failed"
            self._drop(peer)

    def _take(self, peer: _Peer, line: str) -> None:
        peer.heard = time.monotonic()
        word, _, rest = line.partition(" ")
        if peer.rank is None:
            number, _, peer.host = rest.partition(" ")
            if secrets.compare_digest(word.encode(), self.token.encode()) and number.isdecimal():
                peer.rank = int(number)
                with self._lock:
                    self._peers.append(peer)
            else:  # not a rank of this run
                self._drop(peer)
        elif word == "bye":
            self._left[peer.rank] = peer.heard
            self._drop(peer)
        elif word == "failed":
            self.lost = self.lost or f"{_name(peer)} failed: {rest}"
            self._drop(peer)
        elif word == "lost" and peer.rank == 0:
            self._told, self.lost = True, self.lost or rest

    def _drop(self, peer: _Peer) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(peer.socket)
        peer.socket.close()
        with self._lock, suppress(ValueError):
            self._peers.remove(peer)

    def _silent(self, peers: Sequence[_Peer], now: float) -> str | None:
        for peer in peers:
            if now - peer.heard > self._timeout:
                return (
                    f"rank {peer.rank} has not answered for {self._timeout:g} seconds: its process is stopped, or its "
                    "machine cannot be reached"
                )
        return None

    def _ended_processes(self) -> dict[int, str]:
        """The processes of this machine that have ended, with another status than 0: how, by rank."""
        found = {}
        if self._parent is not None and os.getppid() != self._parent:
            found[0] = "rank 0 ended"
        for rank, child in enumerate(self._children, start=1):
            if status := child.poll():
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                found[rank] = f"rank {rank} {how}"
        return found

    def _just_ended(self) -> str | None:
        """The process whose connection has ended. The system may take a moment to say that it has, too."""
        deadline = time.monotonic() + (self._beat if self._children else 0)
        while not (how := self._without_farewell(self._ended_processes())) and time.monotonic() < deadline:
            time.sleep(0.02)
        return how

    def _without_farewell(self, ended: dict[int, str]) -> str | None:
        """The first of some processes that has said no farewell, or so long ago that this rank waits in vain."""
        since = time.monotonic() - _PATIENCE * GRACE_SECONDS
        return next((how for rank, how in ended.items() if self._left.get(rank, since) <= since), None)

    def _end(self) -> None:
        if self.speaks:
            with suppress(OSError, ValueError):
                print(f"error: {self.lost}; go on with: {self._advice()}", file=sys.stderr, flush=True)
        self.end_children()
        if self._parent is not None and os.getppid() == self._parent:  # it is stopped
            with suppress(OSError):
                os.kill(self._parent, signal.SIGKILL)
        os._exit(1)


def _name(peer: _Peer) -> str:
    where = f" (on {peer.host})" if peer.host and peer.rank else ""
    return f"rank {peer.rank}{where}"
