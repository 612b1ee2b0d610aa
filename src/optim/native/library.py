"""Compiles the C kernels, once per machine, and loads them from a cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # imported before loading, so that the kernels share torch's OpenMP threads

_log = logging.getLogger("optim")
_HERE = Path(__file__).parent
_SOURCES = ("kernels.c", "kernels.h")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Apple's compiler has no -fopenmp, others no -march=native. The variants without them are slower, not different.
_VARIANTS = ((*_FLAGS, "-fopenmp"), _FLAGS, tuple(flag for flag in _FLAGS if flag != "-march=native"))

_WITHOUT = "Adagrad, Clippy, GC, AGC and LAMB run in plain torch, several times slower"


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the kernels. None, with the reason logged, where there is no compiler or the library does not load."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if (found := _which(name))), None)
    if compiler is None or platform.system() == "Windows":
        _log.info("no C compiler found: %s", _WITHOUT)
        return None
    for flags in _VARIANTS:
        try:
            return ctypes.CDLL(str(_compiled(compiler, flags)))
        except (OSError, subprocess.SubprocessError) as error:
            _log.info("C kernels with %s: %s", " ".join(flags), getattr(error, "stderr", None) or error)
    _log.info("no C kernels: %s", _WITHOUT)
    return None


def _which(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def _compiled(compiler: str, flags: tuple[str, ...]) -> Path:
    """Return the compiled library, from the cache where this source, compiler and processor have one."""
    source = b"".join((_HERE / name).read_bytes() for name in _SOURCES)
    key = hashlib.sha256(b"\0".join([source, compiler.encode(), " ".join(flags).encode(), _processor()])).hexdigest()
    folder = _cache_folder()
    library = folder / f"kernels-{key[:16]}.so"
    if library.exists():
        return library
    _log.info("compiling C kernels, once: %s", library)
    # Several processes may get here at once. Each compiles its own file, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *flags, str(_HERE / _SOURCES[0]), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        made.replace(library)
    return library


def _processor() -> bytes:
    """Return what -march=native depends on, because different machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(
            sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
        ).encode()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}".encode()


def _cache_folder() -> Path:
    """Return a folder that no other user can write to, because code is loaded from it."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "evenkeel-optim"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError as error:
        _log.info("%s cannot be used: %s", folder, error)
    return Path(tempfile.mkdtemp(prefix="evenkeel-optim-"))  # readable by this user alone; compiled anew each time
