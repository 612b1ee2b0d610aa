"""Compiles the C kernels, once per machine, and loads them from a cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch  # imported before loading, so that the kernels share torch's OpenMP threads

from optim.native.structs import LAYOUT

_log = logging.getLogger("optim")
_HERE = Path(__file__).parent
_SOURCES = ("kernels.c", "kernels.h", "adam.h")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Apple's compiler has no -fopenmp, others no -march=native. The variants without them are slower, not different.
_VARIANTS = ((*_FLAGS, "-fopenmp"), _FLAGS, tuple(flag for flag in _FLAGS if flag != "-march=native"))

FUNCTIONS = ("optim_layout", "optim_reduce", "optim_finite", "optim_step", "optim_record")
_WITHOUT = "all methods run in plain torch, several times slower"


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the kernels. None, with the reason logged, where there is no compiler or the library does not load."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if (found := _which(name))), None)
    if compiler is None or platform.system() == "Windows":
        _log.info("no C compiler found: %s", _WITHOUT)
        return None
    with _cache_folder() as folder:
        for flags in _VARIANTS:
            try:
                library = ctypes.CDLL(str(_compiled(compiler, flags, folder)))
            except (OSError, subprocess.SubprocessError) as error:
                _log.info("C kernels with %s: %s", " ".join(flags), getattr(error, "stderr", None) or error)
                continue
            if all(hasattr(library, name) for name in FUNCTIONS) and library.optim_layout() == LAYOUT:
                return library
            _log.warning("the C kernels are not of this version of optim, which was changed while it ran")
    _log.info("no C kernels: %s", _WITHOUT)
    return None


def _which(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def _compiled(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """Return the compiled library, from the folder where this source, compiler and processor have one.

    Its name ends in a checksum of its content, so that a damaged file is found before it is loaded.
    """
    source = b"".join((_HERE / name).read_bytes() for name in _SOURCES)
    key = hashlib.sha256(b"\0".join([source, compiler.encode(), " ".join(flags).encode(), _processor()])).hexdigest()
    for library in sorted(folder.glob(f"kernels-{key[:16]}-*.so")):
        if _is_private(library, stat.S_ISREG) and library.stem.endswith(f"-{_checksum(library)}"):
            return library
        _log.warning("%s is damaged, or others can write to it: compiling the C kernels again", library)
        library.unlink()
    _log.info("compiling C kernels, once: %s", folder)
    # Several processes may get here at once. Each compiles its own file, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "kernels.so"
        command = [compiler, *flags, str(_HERE / _SOURCES[0]), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        made.chmod(0o700)
        return made.replace(folder / f"kernels-{key[:16]}-{_checksum(made)}.so")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _is_private(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is of this kind, no link, and this user alone can write to it."""
    info = path.lstat()
    return kind(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _processor() -> bytes:
    """Return what -march=native depends on, because different machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(
            sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
        ).encode()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}".encode()


@contextlib.contextmanager
def _cache_folder() -> Iterator[Path]:
    """Give a folder that no other user can write to, because code is loaded from it.

    That is `evenkeel-optim` in the user's cache, or a folder of the user in the temporary directory. Where neither is
    private, one for this process alone, which is removed after loading.
    """
    folder = next(filter(_can_be_used, _cache_folders()), None)
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="evenkeel-optim-") as scratch:
        yield Path(scratch)


def _can_be_used(folder: Path) -> bool:
    """Whether code may be kept in a folder. Makes it where it is missing."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = _is_private(folder, stat.S_ISDIR) and _keeps_names(folder.parent) and os.access(folder, os.W_OK)
    except OSError as error:
        _log.info("%s cannot be used for the C kernels: %s", folder, error)
        return False
    if not usable:
        _log.warning("%s is a link, or others can write to it: not used for the C kernels", folder)
    return usable


def _cache_folders() -> Iterator[Path]:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the specification: relative paths are to be ignored
        yield Path(base, "evenkeel-optim")
    else:
        with contextlib.suppress(RuntimeError):  # no HOME, and no entry in the password database
            home = Path.home()
            if home.is_absolute():
                yield home / ".cache" / "evenkeel-optim"
    yield Path(tempfile.gettempdir(), f"evenkeel-optim-{os.getuid()}")


def _keeps_names(folder: Path) -> bool:
    """Whether other users cannot rename what is in a folder: not writable for all, or sticky like /tmp."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_ISVTX) or not mode & stat.S_IWOTH
