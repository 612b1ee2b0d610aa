"""What the size of an embedding table costs: ``python scripts/bench/bench_tables.py FOLDER --rows 1000000 30000000``.

Trains Small with one large table (``model.net.sparse_embeddings=true``) on a log whose ids are drawn by a power law
from as many ids as the table has rows, once for each size, through ``train.py``. Reported are the CPU milliseconds of a
step in the training thread, the seconds for which a checkpoint stops training and their share of the interval between
two, the sizes of the files, and memory. Where others use the machine, only the CPU times mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bench_report import Line, report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DAY_MS, START_MS = 86_400_000, 1_767_225_600_000


def write_log(folder: Path, *, ids: int, dim: int, rows: int) -> None:
    """Two days of rows with four ids each, by a power law over all ids, and a hold-out of 10,000 rows."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for day, count in enumerate((rows // 2, rows - rows // 2, 10_000)):
        at = START_MS + day * DAY_MS + np.arange(count, dtype=np.int64) * (DAY_MS // count)
        columns: dict[str, Any] = {"time_ms": at}
        for feature in ("a", "b", "c", "d"):
            columns[f"id_{feature}"] = (ids * rng.random(count) ** 2).astype(
                np.int64
            )  # the k-th id about as 1 / sqrt(k)
        for place in range(8):
            columns[f"x_{place}"] = rng.standard_normal(count, dtype=np.float32)
        columns["click"] = (rng.random(count) < 0.3).astype(np.int8)
        pq.write_table(pa.table(columns), folder / f"day={day}.parquet", row_group_size=65_536)
    share = {"num_embeddings": ids, "embedding_dim": dim}
    schema = {
        "name": "tables",
        "time_column": "time_ms",
        "dense": [{"name": f"x_{place}"} for place in range(8)],
        "categorical": [
            {"name": "id_a", **share},
            *({"name": f"id_{feature}", "table": "id_a", "embedding_dim": dim} for feature in "bcd"),
        ],
        "tasks": [{"name": "click"}],
    }
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False), encoding="utf-8")


def train(folder: Path, ids: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of the ledger of one run."""
    log, run, ledger = folder / "log", folder / "run", folder / "ledger.jsonl"
    write_log(log, ids=ids, dim=given.dim, rows=given.steps * given.batch_size)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    words = [
        "data=parquet",
        f"data.source={log}",
        "model=small",
        "model.net.sparse_embeddings=true",
        "trainer=cpu",
        "logger=csv",
        "train.threads=1",
        "train.progressive=false",
        "train.eval_every=0",
        f"train.checkpoint_every={given.every}",
        f"scale.batch_size={given.batch_size}",
        "callbacks.snapshots.every=0",
        "~callbacks.capsules",
        f"hydra.run.dir={run}",
        "+callbacks.ledger._target_=length_ledger.Ledger",
        f"+callbacks.ledger.path={ledger}",
        "+callbacks.ledger.every=10",
        f"+callbacks.ledger.batch_size={given.batch_size}",
        *given.overrides,
    ]
    with (folder / "out").open("w", encoding="utf-8") as out:
        command = [sys.executable, str(ROOT / "train.py"), *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=out, stderr=out)
    return [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]


def lines_of(name: str, found: Sequence[dict[str, Any]], run: Path, every: int) -> list[Line]:
    """What one run showed, from its second checkpoint on: the first one waits for the first full copy."""
    written = [entry for entry in found if "checkpoint" in entry]
    stops = written[1:-1]
    first = written[0]["checkpoint"]
    steps = [entry for entry in found if "rows" in entry and entry["step"] > first]
    a_step = statistics.median(
        (after["thread"] - before["thread"]) / (after["step"] - before["step"]) for before, after in pairwise(steps)
    )
    stopped = statistics.median(entry["thread"] for entry in stops)
    waited = statistics.median(entry["seconds"] for entry in stops)
    newest = max((run / "checkpoints").glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime)
    copies = list((run / "checkpoints" / "full_copies").glob("*.zip"))
    return [
        Line(f"{name}: a step", 1000 * a_step, "CPU ms"),
        Line(f"{name}: a checkpoint stops training", 1000 * stopped, "CPU ms"),
        Line(f"{name}: the same, by the clock", 1000 * waited, "ms"),
        Line(f"{name}: share of the interval", stopped / (stopped + every * a_step), "ratio", "<= 0.05"),
        Line(f"{name}: the newest checkpoint", newest.stat().st_size / 1e6, "MB"),
        Line(f"{name}: a full copy", max((path.stat().st_size for path in copies), default=0) / 1e6, "MB"),
        Line(f"{name}: memory", steps[-1]["megabytes"], "MB"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for logs and runs, each removed after it was measured")
    parser.add_argument("overrides", nargs="*", help="further overrides of each run")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], help="of the table")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    given = parser.parse_intermixed_args(arguments)
    lines = []
    for ids in given.rows:
        folder = given.folder.resolve() / f"{ids}"
        found = train(folder, ids, given)
        lines += lines_of(f"{ids:,} rows", found, folder / "run", given.every)
        shutil.rmtree(folder)
    return report(lines, given.json, title=f"tables of width {given.dim}, batches of {given.batch_size}")


if __name__ == "__main__":
    sys.exit(main())
