"""Which checkpoint a run resumes from, and that no damaged one is taken for an intact one."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from ranker.errors import UserError
from ranker.runs.checkpoint_files import Best, by_step, damage, newest_intact, path_of
from support import assert_equal


def write(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, step)
    torch.save({"global_step": step, "weights": torch.arange(500, dtype=torch.float32) + step}, path)
    return path


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_file_times_say(tmp_path: Path) -> None:
    for step in (1000, 900, 5):
        path = write(tmp_path, step)
        os.utime(path, (2_000_000_000 - step, 2_000_000_000 - step))  # as a copied folder may have them
    (tmp_path / "mine.ckpt").write_bytes(b"the user's own")

    assert [path.name for path in by_step(tmp_path)] == ["step=5.ckpt", "step=900.ckpt", "step=1000.ckpt"]
    assert newest_intact(tmp_path, print).name == "step=1000.ckpt"


@pytest.mark.parametrize("harm", ["empty", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, harm: str) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    for path in by_step(tmp_path)[1:]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"empty": b"", "truncated": content[:700], "flipped": bytes(content)}[harm])
    said: list[str] = []

    assert newest_intact(tmp_path, said.append) == path_of(tmp_path, 10)
    assert [Path(line.split(" is ")[0]).name for line in said] == ["step=30.ckpt", "step=20.ckpt"]
    path_of(tmp_path, 10).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        newest_intact(tmp_path, said.append)


def test_no_checkpoint_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        newest_intact(tmp_path, print)


def test_whatever_bit_flips_is_found_or_changes_nothing_that_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    whole, found = path.read_bytes(), 0
    expected = torch.load(path, weights_only=True)
    for place in range(0, len(whole), 13):
        content = bytearray(whole)
        content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        if damage(path) is not None:
            found += 1
            continue
        try:
            loaded = torch.load(io.BytesIO(bytes(content)), weights_only=True)
        except RuntimeError:  # torch itself refuses it
            continue
        assert_equal(expected, loaded, f"byte {place}")
    assert found > 150, "every 13th of the 2,000 bytes of the weights, and more"


def test_the_best_checkpoint_replaces_the_one_before_and_is_never_the_newest(tmp_path: Path) -> None:
    write(tmp_path, 40)
    for step, value in ((10, 0.6), (30, 0.7)):
        write(tmp_path / "best", step)
        Best("val/click/auc", step, value).write(tmp_path)

    assert Best.read(tmp_path) == Best("val/click/auc", 30, 0.7)
    assert [path.name for path in (tmp_path / "best").glob("*.ckpt")] == ["step=30.ckpt"]
    assert newest_intact(tmp_path, print) == path_of(tmp_path, 40)
    path_of(tmp_path / "best", 30).unlink()
    assert Best.read(tmp_path) is None
