"""Ranks that a launcher has started find each other at a store that holds what an earlier attempt left."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from ranker import launched, meeting
from ranker.errors import UserError
from ranker.launched import Launch
from ranker.meeting import Meeting, Told

TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    "TORCHELASTIC_ERROR_FILE": "/tmp/torchelastic_x/none_y/attempt_1/1/error.json",
}
SRUN = {
    **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "8", "SLURM_NNODES": "4"},
    **{"SLURM_PROCID": "3", "SLURM_STEP_ID": "0"},
}


@pytest.fixture
def entrance() -> TCPStore:
    return meeting._store("127.0.0.1", 0, serve=True)


def launches(size: int, scratch: Path | None = None) -> list[Launch]:
    return [Launch("torchrun", rank=rank, size=size, local_size=1, scratch=scratch) for rank in range(size)]


def met(entrance: TCPStore, known: list[str]) -> tuple[list[TCPStore], list[str]]:
    """The stores of ranks that know of these run folders, and the folders that rank 0 hears of."""
    ranks = launches(len(known))
    with ThreadPoolExecutor(len(known)) as pool:
        others = [
            pool.submit(meeting._enter, rank, entrance.clone(), folder, where="there")
            for rank, folder in zip(ranks[1:], known[1:], strict=True)
        ]
        store, folders = meeting._receive(ranks[0], entrance, known[0], "127.0.0.1")
        return [store, *(other.result(timeout=30) for other in others)], folders


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Launch("torchrun", rank=3, size=8, local_size=2, scratch=Path("/tmp/torchelastic_x/none_y"))),
        (TORCHRUN | {"TORCHELASTIC_ERROR_FILE": ""}, Launch("torchrun", rank=3, size=8, local_size=2)),
        (SRUN, Launch("srun", rank=3, size=8, local_size=2)),
        (SRUN | {"SLURM_NTASKS": "1"}, None),
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, None),
        (SRUN | {"SLURM_STEP_ID": "4294967291"}, None),  # the batch script itself
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}, None),
    ],
)
def test_a_process_knows_who_started_it(environment: dict[str, str], expected: Launch | None) -> None:
    assert launched.launch(environment) == expected
    if expected is not None:
        assert expected.nodes == 4


def test_ranks_meet_again_and_again_at_a_store_that_keeps_everything(entrance: TCPStore) -> None:
    ports = []
    for attempt in range(3):
        stores, folders = met(entrance, ["", "runs/x" if attempt else "", ""])
        assert len({store.port for store in stores}) == 1
        assert sorted(filter(None, folders)) == (["runs/x"] if attempt else [])
        stores[0].set("said", str(attempt))
        assert stores[2].get("said") == str(attempt).encode()
        ports.append(stores[0].port)
    assert len(set(ports)) == 3, "a store of its own for each attempt"


def test_the_others_are_told_the_run_and_note_it_for_a_restart(entrance: TCPStore, tmp_path: Path) -> None:
    scratch = [tmp_path / name for name in ("a", "b")]
    for folder in scratch:
        folder.mkdir()
    first, second = (Launch("torchrun", rank=r, size=2, local_size=1, scratch=scratch[r]) for r in range(2))

    Meeting(first, entrance).announce(Path("/runs/x"), Path("/runs/x/checkpoints/step=7.ckpt"))
    told = Meeting(second, entrance).told()

    assert told == Told("/runs/x", "/runs/x/checkpoints/step=7.ckpt")
    assert [meeting._noted(launch) for launch in (first, second)] == ["/runs/x"] * 2


def test_a_first_rank_that_ends_without_a_run_lets_the_others_end(entrance: TCPStore) -> None:
    first, second = launches(2)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(Meeting(second, entrance.clone()).told)
        Meeting(first, entrance).end(2)
        assert other.result(timeout=30) == 2
    announced = Meeting(first, entrance)
    announced.announce(Path("/runs/x"), None)
    announced.end(0)
    assert json.loads(entrance.get("run"))["folder"] == "/runs/x", "a run was announced, and is not taken back"


def test_ranks_that_do_not_come_are_counted(entrance: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "TO_MEET", 0.3)
    with pytest.raises(UserError, match=r"only 1 of 3 processes have started within 0\.3 seconds"):
        meeting._receive(launches(3)[0], entrance, "", "127.0.0.1")
    with pytest.raises(UserError, match=r"rank 1 has not met rank 0 at there within 0\.3 seconds"):
        meeting._enter(launches(3)[1], entrance, "", where="there")


def test_a_port_that_is_taken_is_said() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match=r"cannot meet at 127\.0\.0\.1:"),
    ):
        meeting._store("127.0.0.1", taken.getsockname()[1], serve=True)
    assert meeting._own_address("127.0.0.1", 29500) == "127.0.0.1"
