"""The ranks that torchrun or srun has started find each other, and agree on the run folder before the run begins."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranker.errors import UserError
from ranker.launched import Launch, launch

if TYPE_CHECKING:
    from torch.distributed import TCPStore

TO_MEET = 300.0  # seconds in which all ranks must have started
TO_BEGIN = 1800.0  # seconds that rank 0 may take to open the log and to build the model
TO_LEAVE = 30.0  # seconds that rank 0 waits for the others to hear that there is no run
_POLL = 0.1
_POINTER = "evenkeel_run"  # in the folder of a torchrun agent: path of the run that its workers train


@dataclass(frozen=True)
class Told:
    """What rank 0 tells the other ranks.

    Attributes:
        folder: the run folder.
        checkpoint: where the run goes on; None for a new one.
    """

    folder: str
    checkpoint: str | None


class Meeting:
    """The ranks of a launcher before their process group exists: they share a store that rank 0 serves.

    torchrun starts the same command again after a failure (``--max-restarts``), with other numbers of ranks and other
    machines where it must. What its agents have in common with the attempt before is a folder of their own on each
    machine. There the path of the run is noted, and rank 0 takes the run that any agent knows.

    Attributes:
        launch: what the launcher has told this process.
        earlier: run folder of the attempt before; None for the first, and in other ranks than 0.
    """

    def __init__(self, launch: Launch, store: TCPStore, *, earlier: Path | None = None) -> None:
        self.launch, self.earlier = launch, earlier
        self._store, self._announced = store, False

    def announce(self, folder: Path, checkpoint: Path | None) -> None:
        """Tells the other ranks where the run is. Rank 0 calls it when nothing can fail for a mistake of the user."""
        if self.launch.rank == 0:
            _note(self.launch, str(folder))
            self._publish({"folder": str(folder), "checkpoint": None if checkpoint is None else str(checkpoint)})

    def told(self) -> Told | int:
        """Waits for what rank 0 announces: the run, or the status with which it ended.

        Raises:
            UserError: rank 0 is gone, or does not come to it.
        """
        if not _until(lambda: self._store.check(["run"]), TO_BEGIN):
            raise UserError(f"rank 0 has not begun to train within {TO_BEGIN:g} seconds")
        found = json.loads(self._store.get("run"))
        self._store.add("read", 1)
        if "ended" in found:
            return int(found["ended"])
        _note(self.launch, found["folder"])
        return Told(**found)

    def end(self, status: int) -> None:
        """Lets the other ranks end, where rank 0 ends without a run: after a mistake, or ``--help``."""
        if self.launch.rank == 0 and not self._announced:
            with suppress(UserError, RuntimeError):
                self._publish({"ended": status})
                _until(lambda: self._store.add("read", 0) >= self.launch.size - 1, TO_LEAVE)

    def _publish(self, what: Mapping[str, object]) -> None:
        self._announced = True
        self._store.set("run", json.dumps(what))


_CURRENT: list[Meeting] = []  # its store must live as long as the process: that of rank 0 serves all


def current() -> Meeting | None:
    """The meeting of this process, if it has joined one."""
    return _CURRENT[0] if _CURRENT else None


def meet() -> Meeting | None:
    """Joins the ranks that a launcher has started together; None for a process that has no launcher.

    The store at the launcher's address may hold what the attempt before has left: torch 2.13 keeps it over restarts,
    and the process group would wait for processes that are gone. So rank 0 serves a new store, and from here on the
    environment of all ranks leads there.

    Raises:
        UserError: the ranks do not find each other.
    """
    found = launch()
    if found is None:
        return None
    address, port, known = *_address(found), _noted(found)
    serves = found.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    entrance = _store(address, port, serve=serves)
    if found.rank:
        store, folders = _enter(found, entrance, known, where=f"{address}:{port}"), [known]
    else:
        address = _own_address(address, port)
        store, folders = _receive(found, entrance, known, address)
    os.environ |= {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    earlier = next((Path(folder) for folder in folders if folder and Path(folder).is_dir()), None)
    _CURRENT[:] = [Meeting(found, store, earlier=earlier)]
    return _CURRENT[0]


def _enter(found: Launch, entrance: TCPStore, known: str, *, where: str) -> TCPStore:
    """The new store, in a rank above 0.

    An answer of rank 0 that has this rank's word, which was never written before, is of this attempt.
    """
    word, answer = secrets.token_hex(8), dict[str, Any]()
    entrance.set(_key(found.rank), f"{word} {known}")

    def answered() -> bool:
        if entrance.check([_key(0)]):
            answer.update(json.loads(entrance.get(_key(0))))
        return answer.get("words", {}).get(str(found.rank)) == word

    if not _until(answered, TO_MEET):
        raise UserError(f"rank {found.rank} has not met rank 0 at {where} within {TO_MEET:g} seconds")
    store = _store(answer["address"], answer["port"])
    store.set(_key(found.rank), "")
    return store


def _receive(found: Launch, entrance: TCPStore, known: str, address: str) -> tuple[TCPStore, list[str]]:
    """The new store, in rank 0, and the run folders that the machines know of.

    Rank 0 answers with all the words that it sees, until all ranks have come through.
    """
    store, words, others = _store(address, 0, serve=True), dict[int, str](), range(1, found.size)

    def complete() -> bool:
        seen = {rank: entrance.get(_key(rank)).decode() for rank in others if entrance.check([_key(rank)])}
        if seen != words:
            words.update(seen)
            answer = {"address": address, "port": store.port, "words": {r: w.split(" ")[0] for r, w in seen.items()}}
            entrance.set(_key(0), json.dumps(answer))
        return all(store.check([_key(rank)]) for rank in others)

    if not _until(complete, TO_MEET):
        there = 1 + sum(store.check([_key(rank)]) for rank in others)
        raise UserError(f"only {there} of {found.size} processes have started within {TO_MEET:g} seconds")
    return store, [known, *(word.partition(" ")[2] for word in words.values())]


def _key(rank: int) -> str:
    return f"evenkeel/{rank}"


def _address(found: Launch) -> tuple[str, int]:
    """Where the launcher lets its processes meet."""
    if found.program == "torchrun":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    from lightning_fabric.plugins.environments import SLURMEnvironment

    place = SLURMEnvironment(auto_requeue=False)
    return place.main_address, place.main_port


def _own_address(address: str, port: int) -> str:
    """The address at which others reach this machine: the given one, unless that is another machine's."""
    try:
        family, kind, _, _, there = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing: the system chooses the interface
            own = str(probe.getsockname()[0])
    except OSError:
        return address
    return address if own == there[0] else own


def _store(address: str, port: int, *, serve: bool = False) -> TCPStore:
    """A client of a store, or its server. torch's process group may use the same one (``multi_tenant``).

    Raises:
        UserError: nobody serves it, or the port is taken.
    """
    from torch.distributed import DistError, TCPStore

    deadline, why = time.monotonic() + TO_MEET, ""
    while not why or (time.monotonic() < deadline and not serve):
        try:  # in short calls, between which a signal is handled
            timeout = timedelta(seconds=5)
            return TCPStore(address, port, is_master=serve, timeout=timeout, wait_for_workers=False, multi_tenant=True)
        except DistError as error:
            why = " ".join(str(error).split())[:200]
    raise UserError(f"the processes of this run cannot meet at {address}:{port} ({why})")


def _noted(found: Launch) -> str:
    path = None if found.scratch is None else found.scratch / _POINTER
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else ""


def _note(found: Launch, folder: str) -> None:
    if found.scratch is not None:
        with suppress(OSError):  # without it a restart begins anew
            (found.scratch / _POINTER).write_text(folder, encoding="utf-8")


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits for a condition in short steps, between which a signal is handled. Returns whether it came true.

    Raises:
        UserError: the store is gone, and with it rank 0 or the torchrun agent of its machine.
    """
    deadline = time.monotonic() + seconds
    try:
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
    except RuntimeError as error:
        raise UserError("rank 0, or the torchrun agent of its machine, ended before training began") from error
    return True
