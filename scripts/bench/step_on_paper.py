"""Bytes and time of a step on 1 to 512 GPUs, computed from sizes and link speeds: nothing here is measured.

    python scripts/bench/step_on_paper.py
    python scripts/bench/step_on_paper.py --table-rows 1e9 --dim 64 --ids 60 --rows 8192 --link 25 --gpus 8,64

Every number has an option; the formulas are in ``step``. docs/scale.md shows the table of the default sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT, ID = 4, 8  # bytes


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, a batch and a cluster.

    Attributes:
        rows: rows of a batch that one GPU takes, b.
        dense: parameters outside the tables, P.
        table_rows: rows of all tables, R.
        dim: width of a table row, D.
        ids: ids of a training row over all features, k.
        touched: share of the b k ids of a batch that are distinct table rows, u.
        read: rows a second that the loader of one rank reads (docs/data-benchmark.md).
        flops: FLOPs a second that a GPU reaches in this model.
        node: GPUs of a machine.
        inside: bytes a second that a GPU sends inside its machine.
        link: bytes a second that a GPU sends to other machines.
    """

    rows: float = 8192
    dense: float = 50.8e6
    table_rows: float = 1e8
    dim: float = 16
    ids: float = 30
    touched: float = 0.5
    read: float = 6e5
    flops: float = 200e12
    node: int = 8
    inside: float = 450e9
    link: float = 50e9


@dataclass(frozen=True)
class Step:
    """A step on n GPUs: bytes that one GPU sends or keeps, and seconds."""

    gpus: int
    compute: float
    dense_bytes: float
    full_bytes: float
    sparse_bytes: float
    sharded_bytes: float
    memory: float
    sharded_memory: float
    reading: float
    reading_all: float
    speed: float

    def seconds(self, sent: float) -> float:
        """Time to send so many bytes."""
        return sent / self.speed


def step(sizes: Sizes, gpus: int) -> Step:
    """The bytes and times of a step.

    - computing: 6 P b FLOPs, a multiplication and an addition a weight, forward and twice backward;
    - dense part, ring all-reduce: 2 (n - 1) / n 4 P bytes;
    - tables as dense gradients (``sparse_embeddings=false``): the same with R D in place of P;
    - tables as sparse gradients (true), all-gather: (n - 1) u b k (8 + 4 D) bytes, which grow with n;
    - sharded tables, three all-to-all (ids there, vectors back, gradients there): (n - 1) / n b k (8 + 2 4 D) bytes;
    - memory of replicated tables with one accumulator: 2 4 R D bytes; sharded, an n-th;
    - reading: b rows a rank with ``data.strips``, n b rows without: then every rank reads every window.
    """
    n, b = gpus, sizes.rows
    ring = 2 * (n - 1) / n * FLOAT
    found = sizes.ids * b
    tables = sizes.table_rows * sizes.dim
    return Step(
        gpus=n,
        compute=6 * sizes.dense * b / sizes.flops,
        dense_bytes=ring * sizes.dense,
        full_bytes=ring * tables,
        sparse_bytes=(n - 1) * sizes.touched * found * (ID + FLOAT * sizes.dim),
        sharded_bytes=(n - 1) / n * found * (ID + 2 * FLOAT * sizes.dim),
        memory=2 * FLOAT * tables,
        sharded_memory=2 * FLOAT * tables / n,
        reading=b / sizes.read,
        reading_all=n * b / sizes.read,
        speed=sizes.inside if n <= sizes.node else sizes.link,
    )


def table(sizes: Sizes, gpus: Sequence[int], log_rows: float) -> list[str]:
    """The table in Markdown."""
    steps = [step(sizes, n) for n in gpus]

    def row(name: str, *cells: str) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def sent(name: str, of: str) -> str:
        return row(name, *(f"{_bytes(getattr(s, of))}, {_time(s.seconds(getattr(s, of)))}" for s in steps))

    def whole(name: str, of: str) -> str:
        """A pass over the log: no overlap at the most, perfect overlap at the least."""
        cells = []
        for s in steps:
            parts = s.compute, s.seconds(s.dense_bytes) + s.seconds(getattr(s, of)), s.reading
            passes = log_rows / (sizes.rows * s.gpus)
            cells.append(f"{_time(max(parts) * passes)} to {_time(sum(parts) * passes)}")
        return row(name, *cells)

    return [
        row("GPUs", *(f"{n}" for n in gpus)),
        row("---", *("---" for _ in gpus)),
        row("rows a step", *(f"{sizes.rows * n:,.0f}" for n in gpus)),
        row("computing", *(_time(s.compute) for s in steps)),
        sent("dense part, all-reduce", "dense_bytes"),
        sent("tables, dense gradients", "full_bytes"),
        sent("tables, sparse gradients", "sparse_bytes"),
        sent("tables, sharded", "sharded_bytes"),
        row("tables in each GPU, replicated", *(_bytes(s.memory) for s in steps)),
        row("tables in each GPU, sharded", *(_bytes(s.sharded_memory) for s in steps)),
        row("reading, data.strips", *(_time(s.reading) for s in steps)),
        row("reading, no strips", *(_time(s.reading_all) for s in steps)),
        whole(f"{log_rows:.0e} rows, sparse gradients", "sparse_bytes"),
        whole(f"{log_rows:.0e} rows, sharded", "sharded_bytes"),
    ]


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _time(seconds: float) -> str:
    for unit, size in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plain = Sizes()
    for name, text, unit in (
        ("rows", "rows of a batch that one GPU takes", 1.0),
        ("dense", "parameters outside the tables", 1.0),
        ("table-rows", "rows of all tables", 1.0),
        ("dim", "width of a table row", 1.0),
        ("ids", "ids of a training row over all features", 1.0),
        ("touched", "distinct table rows of a batch, as a share of its ids", 1.0),
        ("read", "rows a second that the loader of one rank reads", 1.0),
        ("flops", "TFLOP/s that a GPU reaches in this model", 1e12),
        ("inside", "GB/s that a GPU sends inside its machine", 1e9),
        ("link", "GB/s that a GPU sends to other machines", 1e9),
    ):
        default = getattr(plain, name.replace("-", "_")) / unit
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{text} (default {default:g})")
    parser.add_argument("--node", type=int, default=plain.node, help=f"GPUs of a machine (default {plain.node})")
    parser.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64, 512])
    parser.add_argument("--log-rows", type=float, default=1e9, help="rows of the log (default 1e9)")
    given = vars(parser.parse_args(arguments))
    gpus, log_rows = given.pop("gpus"), given.pop("log_rows")
    for name, unit in (("flops", 1e12), ("inside", 1e9), ("link", 1e9)):
        given[name] *= unit
    if min(gpus) < 1 or min(given.values()) <= 0:
        parser.error("every size must be above 0")
    print("\n".join(table(Sizes(**given), gpus, log_rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
