"""What the memory traffic of a step costs without its arithmetic: the floors beside which `bench_optim.py` puts steps.

Needs the C compiler that the kernels of `optim` need; built anew at each run, since it takes a second.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from optim.native.rows import gather_rows, scatter_rows
from optim.pages import new_state
from torch import Tensor, nn

from bench_report import Line

READS = {"nothing": 0, "g": 1, "w, g": 3, "w, g, G": 7}
"""What a first pass reads, and the C code's number for it."""
MUST_READ = {"clippy": "g", "gc": "g", "agc": "w, g", "lamb": "w, g, G"}
"""By method. Clippy's first pass reads G, too, where the gradient alone settles nothing."""


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("size", ctypes.c_int64),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    flags = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-fopenmp")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "floor.so"
        source = Path(__file__).with_name("bench_floor.c")
        subprocess.run([compiler, *flags, str(source), "-o", str(made)], check=True, timeout=120)
        return ctypes.CDLL(str(made))  # stays mapped when the file is gone


def floor_step(params: Sequence[nn.Parameter], reads: str) -> Callable[[], object]:
    """Return a function that moves the memory of a step: a first pass that reads `reads`, then w, g, G -> w, G.

    It leaves the weights as they are, and has accumulators of its own, as every optimizer of the benchmark has.
    """
    totals = [new_state(param.detach(), 0.1) for param in params]
    call, mask = _library().floor_step, ctypes.c_int64(READS[reads])
    call.restype = ctypes.c_double
    count, threads = ctypes.c_int64(len(totals)), ctypes.c_int64(torch.get_num_threads())

    def step() -> object:
        fields = []
        for param, total in zip(params, totals, strict=True):
            assert param.grad is not None, "the benchmark gives every tensor a gradient"
            fields.append(_Tensor(param.data_ptr(), param.grad.data_ptr(), total.data_ptr(), total.numel()))
        return call((_Tensor * len(fields))(*fields), count, mask, ctypes.c_double(0.0), threads)

    return step


def floor_rows(weight: Tensor, total: Tensor, rows: Tensor) -> Callable[[], object]:
    """Return a function that reads some rows of w and G, and writes them back, each asked for ahead of time."""
    tables = [weight, total]

    def move() -> None:
        scatter_rows(tables, gather_rows(tables, rows), rows)

    return move


def _label(reads: str) -> str:
    """Return what the tables call the floor of a step whose first pass reads this."""
    return f"floor: read {reads}; step"


def floors(params: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """Return the memory traffic of the methods' steps, and of a step without a first pass."""
    wanted = dict.fromkeys(["nothing", *MUST_READ.values()])
    return {_label(reads): floor_step(params, reads) for reads in wanted}


def floors_beside(what: str, medians: dict[str, float], base: str, limit: float) -> list[Line]:
    """Return what the memory alone costs beside the base, and every method beside its own floor.

    A floor above the limit says that no arithmetic, however fast, meets it on this machine with this traffic.
    """
    rows = []
    for label, reads in MUST_READ.items():
        floor = medians[_label(reads)]
        rows.append(
            Line(f"{what}: floor of {label} / {base} (target of {label}: {limit:g})", floor / medians[base], "ratio")
        )
        rows.append(Line(f"{what}: {label} / its floor", medians[label] / floor, "ratio"))
    return rows
