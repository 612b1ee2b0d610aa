from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ranker.atomic import locked, replacing, replacing_folder, write_text
from ranker.errors import UserError


def half_written(path: Path) -> None:
    with replacing(path) as draft:
        draft.write_text("half")
        raise RuntimeError


def half_filled(target: Path) -> None:
    with replacing_folder(target) as draft:
        (draft / "three").write_text("three")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_write_keeps_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError):
        half_written(path)
    assert path.read_text() == "old"
    write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for text in ("one", "two"):
        with replacing_folder(target) as draft:
            (draft / text).write_text(text)
            assert not (target / text).exists()
        assert [f.name for f in target.iterdir()] == [text]
    with pytest.raises(UserError, match="the disk is full at"):
        half_filled(target)
    assert [f.name for f in target.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_lock_in_a_place_that_is_no_folder_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"), locked(tmp_path / "file" / "target"):
        pass
