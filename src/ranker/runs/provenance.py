"""Provenance of a number: the commit of the code and the machine that it ran on."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is needed: a sweep's watch counts cores without it
    import torch


@functools.cache
def commit() -> str | None:
    """The commit of the running code, with ``-dirty`` appended if tracked files were changed.

    None outside a checkout, and if the package is installed inside another project's checkout. Cached per process: the
    modules in memory do not change when the checkout does.
    """
    here = Path(__file__).resolve()
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")


@functools.cache
def machine() -> str:
    """Processor, cores, GPUs and torch's build, such as ``Intel Xeon, 2 cores, torch 2.13.0+cpu``."""
    import torch

    parts = [processor(), f"{cores()} cores"]
    parts += sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    return ", ".join([*parts, f"torch {torch.__version__}"])


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def arithmetic(device: torch.device | str) -> dict[str, Any]:
    """What decides the bits of a training step besides versions: processor, instruction set, threads, device."""
    import torch

    device = torch.device(device)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def processor() -> str:
    """Model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _git(file: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=file.parent, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
