"""A rank that dies or stops ends the run with one line that names it; the newest checkpoint can be resumed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support import (
    ROOT,
    TINY,
    TWO_RANKS,
    assert_equal,
    finished,
    metrics,
    newest_checkpoint,
    ranks_of,
    slowness,
    train_process,
    wait_for,
)

pytestmark = pytest.mark.attack

LONG = ("data.log.train_rows=2000000", "train.eval_every=0", "train.checkpoint_every=5")
SECONDS = 25  # after a death, where 5 are promised, on an idle machine


def training(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    process = train_process(*TINY, *LONG, *TWO_RANKS, *overrides, f"hydra.run.dir={folder}")
    wait_for(lambda: bool(list((folder / "checkpoints").glob("*.ckpt"))), process)
    return process


def lines(errors: str) -> list[str]:
    """What is said, without the warnings of libraries."""
    said = [line for line in errors.splitlines() if line.strip() and not line.startswith("(HYDRA_FULL_ERROR")]
    return [line for line in said if "is deprecated" not in line]


def wait_until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.05)


def test_a_rank_that_is_killed_ends_the_run_which_can_be_resumed(tmp_path: Path) -> None:
    process = training(tmp_path)
    limit = SECONDS * slowness(process.pid)
    os.kill(ranks_of(process)[1], signal.SIGKILL)

    start = time.monotonic()
    _, errors = process.communicate()

    assert time.monotonic() - start < limit
    assert process.returncode == 2
    assert len(lines(errors)) == 1, errors
    line = lines(errors)[0]
    assert "rank 1 was killed by SIGKILL; go on with: " in line
    assert f"resume={tmp_path}" in line
    assert finished(tmp_path).summary["status"] == "failed"
    assert finished(tmp_path).summary["reason"].startswith("interrupted at step ")
    step = newest_checkpoint(tmp_path)["global_step"]
    again = train_process(f"resume={tmp_path}", f"train.max_steps={step + 5}")
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert finished(tmp_path).summary["steps"] == step + 5


def recorded(folder: Path, *overrides: str, kill_at: int | None = None) -> subprocess.Popen[str]:
    """60 steps, in which the rank that comes first to a batch may kill itself."""
    rows = folder.parent / f"{folder.name}_rows"
    rows.mkdir(exist_ok=True)
    at = "null" if kill_at is None else kill_at
    recorder = f"+callbacks.rows={{_target_:row_recorder.RowRecorder,folder:'{rows}',kill_at:{at}}}"
    settings = ("data.log.train_rows=15360", "train.checkpoint_every=7", "train.eval_every=20", "train.log_every=1")
    return train_process(
        *TINY, *settings, *TWO_RANKS, recorder, f"hydra.run.dir={folder}", *overrides, path=ROOT / "tests"
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks") / "run"
    process = recorded(folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("step", random.Random(1).sample(range(7, 60), 3))
def test_a_run_whose_rank_was_killed_anywhere_ends_as_if_it_had_not_been(
    undisturbed: Path, tmp_path: Path, step: int
) -> None:
    folder = tmp_path / "run"
    process = recorded(folder, kill_at=step)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert len(lines(errors)) == 1, errors
    assert newest_checkpoint(folder)["global_step"] == step // 7 * 7

    again = train_process(f"resume={folder}", "trust=[row_recorder.RowRecorder]", path=ROOT / "tests")
    _, errors = again.communicate()

    assert again.returncode == 0, errors
    expected, got = newest_checkpoint(undisturbed), newest_checkpoint(folder)
    for part in ("global_step", "state_dict", "optimizer_states", "train_auc_by_rank"):
        assert_equal(expected[part], got[part], part)
    assert metrics(folder) == metrics(undisturbed)


def test_the_first_rank_that_is_killed_takes_the_other_with_it(tmp_path: Path) -> None:
    process = training(tmp_path)
    other, limit = ranks_of(process)[1], SECONDS * slowness(process.pid)
    process.kill()

    start = time.monotonic()
    _, errors = process.communicate()  # until the other has closed it too

    wait_until_gone(other)
    assert time.monotonic() - start < limit
    assert len(lines(errors)) == 1, errors
    line = lines(errors)[0]
    assert re.search("rank 0 (ended|was killed, or its machine failed); go on with: ", line)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_given_up_after_the_timeout(tmp_path: Path, rank: int) -> None:
    timeout = 10
    process = training(tmp_path, f"trainer.strategy.timeout_seconds={timeout}")
    ranks, limit = ranks_of(process), timeout + SECONDS * slowness(process.pid)
    os.kill(ranks[rank], signal.SIGSTOP)

    start = time.monotonic()
    _, errors = process.communicate()

    for pid in ranks:
        wait_until_gone(pid)
    assert timeout - 2 < time.monotonic() - start < limit
    assert process.returncode != 0
    assert len(lines(errors)) == 1, errors
    line = lines(errors)[0]
    assert f"rank {rank} has not answered for {timeout} seconds" in line
    assert f"resume={tmp_path}" in line
    assert newest_checkpoint(tmp_path)["global_step"] >= 5


def test_a_suspended_run_goes_on(tmp_path: Path) -> None:
    timeout = 5
    process = training(tmp_path, f"trainer.strategy.timeout_seconds={timeout}", "train.log_every=1")
    ranks = ranks_of(process)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * timeout)
    before = newest_checkpoint(tmp_path)["global_step"]
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: newest_checkpoint(tmp_path)["global_step"] > before + 10, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143, errors


def test_a_signal_to_one_rank_while_the_other_writes_a_checkpoint_ends_both(tmp_path: Path) -> None:
    process = training(tmp_path, "train.checkpoint_every=1")
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143, errors
    assert len(lines(errors)) == 1, errors
    assert finished(tmp_path).summary["steps"] == newest_checkpoint(tmp_path)["global_step"]
