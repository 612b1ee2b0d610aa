"""The compiled C kernels are loaded from where this user alone can write, and only if they are whole."""

from __future__ import annotations

import ctypes
import logging
import shutil
from pathlib import Path

import pytest

from optim.native import library
from optim.native.structs import LAYOUT

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and small sources that compile in no time."""
    (tmp_path / "sources").mkdir()
    functions = "".join(f"int {name}(void) {{ return {LAYOUT}; }}\n" for name in library.FUNCTIONS)
    (tmp_path / "sources" / "kernels.c").write_text(functions)
    for name in library._SOURCES[1:]:
        (tmp_path / "sources" / name).write_text("")
    (tmp_path / "tmp").mkdir(mode=0o1777)
    (tmp_path / "base").mkdir(mode=0o700)
    monkeypatch.setattr(library, "_HERE", tmp_path / "sources")
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "base"))
    return tmp_path / "base" / "evenkeel-optim"


def load() -> ctypes.CDLL:
    found = library.load.__wrapped__()
    assert found is not None
    assert found.optim_step() == LAYOUT
    return found


def test_the_library_is_compiled_once(cache: Path) -> None:
    load()
    (made,) = cache.glob("*.so")
    inode = made.stat().st_ino
    load()
    assert [path.stat().st_ino for path in cache.iterdir()] == [inode]
    assert made.stat().st_mode & 0o777 == 0o700
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other functions", "open to others", "link"])
def test_a_damaged_library_is_compiled_again_with_a_warning(
    damage: str, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = library._compiled(str(COMPILER), library._VARIANTS[0], _folder(cache))  # never loaded by this process
    content = compiled.read_bytes()
    if damage == "open to others":
        compiled.chmod(0o777)
    elif damage == "link":
        compiled.rename(tmp_path / "elsewhere.so")
        compiled.symlink_to(tmp_path / "elsewhere.so")
    else:
        changed = content.replace(b"optim_step", b"optim_stop")
        made = {"truncated": content[:2000], "garbage": b"no library", "empty": b"", "other functions": changed}
        compiled.write_bytes(made[damage])
    with caplog.at_level(logging.WARNING, logger="optim"):
        load()
    assert "compiling the C kernels again" in caplog.text
    (made_again,) = cache.glob("*.so")
    assert made_again.read_bytes() == content
    assert not made_again.is_symlink()


def test_sources_that_were_changed_under_a_running_process_are_not_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = tmp_path / "sources" / "kernels.c"
    sources.write_text(sources.read_text().replace(str(LAYOUT), str(LAYOUT + 8)))
    assert library.load.__wrapped__() is None
    assert "not of this version of optim" in caplog.text


def _folder(cache: Path) -> Path:
    cache.mkdir(mode=0o700)
    return cache


@pytest.mark.parametrize("how", ["open to all", "open to the group", "link", "parent open to all", "no folder"])
def test_a_folder_that_others_can_write_to_is_not_used(
    how: str, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "theirs")
    elif how == "no folder":
        cache.write_text("")
    else:
        _folder(cache).chmod({"open to all": 0o777, "open to the group": 0o770}.get(how, 0o700))
        cache.parent.chmod(0o777 if how == "parent open to all" else 0o700)
    with caplog.at_level(logging.INFO, logger="optim"):
        load()
    assert "for the C kernels" in caplog.text
    assert how == "no folder" or not list(cache.iterdir())
    (own,) = (tmp_path / "tmp").iterdir()
    assert own.stat().st_mode & 0o777 == 0o700
    assert len(list(own.glob("*.so"))) == 1
    load()
    assert list((tmp_path / "tmp").iterdir()) == [own]  # not one per process


def test_where_no_folder_is_private_nothing_is_left(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_cache_folders", lambda: iter([_folder(cache)]))
    monkeypatch.setattr(library, "_is_private", lambda _path, kind: False)
    load()
    assert not list((tmp_path / "tmp").iterdir())


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "base")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    load()
    assert not list((tmp_path / "base").iterdir())
    assert len(list((tmp_path / "home" / ".cache" / "evenkeel-optim").glob("*.so"))) == 1


@pytest.mark.parametrize("home", ["nobody's", "relative"])
def test_no_home_is_no_error(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home == "relative":
        monkeypatch.setenv("HOME", "somewhere")
    else:
        monkeypatch.setattr(library.Path, "home", _no_home)
    load()
    assert len(list((tmp_path / "tmp").glob("evenkeel-optim-*/*.so"))) == 1


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
