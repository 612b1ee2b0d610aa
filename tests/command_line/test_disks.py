"""Training on a disk that fills up, has no inodes left or cannot be written, on small file systems of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import TINY, finished, metrics, train_process

pytestmark = [pytest.mark.slow, pytest.mark.attack, pytest.mark.timeout(600)]
EMPTY = (".lock", "train.log")  # these may be: Hydra opens the log first
LONG = ("train.checkpoint_every=4", "train.log_every=1", "train.max_steps=24", "train.eval_every=8")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with the given options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if (
            os.geteuid()
            or shutil.which("mount") is None
            or subprocess.run(command, check=False, capture_output=True).returncode
        ):
            pytest.skip("mounting a tmpfs needs root and the capability to mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Takes all space of a disk but some bytes."""
    space = os.statvfs(disk)
    path = disk / "filler"
    path.write_bytes(b"x" * (space.f_bavail * space.f_frsize - leave))
    return path


def train(*words: str) -> tuple[int, str]:
    process = train_process(*words)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.strip()]


@pytest.mark.parametrize("leave", [2_000_000, 400_000])  # full at a later checkpoint; at the first one
def test_a_full_disk_loses_nothing_and_the_run_goes_on(
    small_disk: Callable[[str], Path], tmp_path: Path, leave: int
) -> None:
    disk = small_disk("size=16m")
    run = disk / "run"
    if leave > 1_000_000:
        status, errors = train(*TINY, *LONG[:2], "train.max_steps=8", LONG[3], f"hydra.run.dir={run}")
        assert status == 0, errors
        size = max(path.stat().st_size for path in run.rglob("*.ckpt"))
        filler = fill(disk, size // 2)
        status, errors = train(f"resume={run}", "train.max_steps=24")
    else:
        filler = fill(disk, leave)
        status, errors = train(*TINY, *LONG, f"hydra.run.dir={run}")

    assert status != 0
    assert "Traceback" not in errors, errors
    assert any("No space left on device" in line for line in lines(errors)), errors
    assert len(lines(errors)) <= 4, errors
    assert [path for path in run.rglob("*") if path.name.endswith(".tmp")] == []
    assert not [
        path for path in run.rglob("*") if path.is_file() and not path.stat().st_size and path.name not in EMPTY
    ]
    rows = [int(row["step"]) for row in metrics(run)]
    assert rows == sorted(set(rows))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "No space left on device" in summary["reason"]
    filler.unlink()
    again = (f"resume={run}",) if leave > 1_000_000 else (*TINY, *LONG, f"hydra.run.dir={run}", "force=true")
    status, errors = train(*again, "train.max_steps=24")
    assert status == 0, errors
    assert (finished(run).summary["status"], finished(run).summary["steps"]) == ("completed", 24)


def test_no_inodes_left_is_one_line(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=16m,nr_inodes=8")

    status, errors = train(*TINY, *LONG, f"hydra.run.dir={disk / 'run'}")

    assert status != 0
    assert "Traceback" not in errors, errors
    assert "No space left on device" in errors
    assert len(lines(errors)) <= 4, errors


def test_a_run_folder_that_cannot_be_written_is_one_line(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=16m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    status, errors = train(*TINY, *LONG, f"hydra.run.dir={disk / 'run'}")

    assert status != 0
    assert "Traceback" not in errors, errors
    assert "Read-only file system" in errors
    assert len(lines(errors)) <= 3, errors


def test_a_full_folder_of_temporary_files_does_not_matter(
    small_disk: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("size=1m")
    fill(disk, 0)
    monkeypatch.setenv("TMPDIR", str(disk))

    status, errors = train(*TINY, *LONG, f"hydra.run.dir={tmp_path / 'run'}")

    assert status == 0, errors
    assert finished(tmp_path / "run").summary["status"] == "completed"
