"""What a large table costs when it is sharded: memory of a process, time of a step, memory of a warm start."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ranker.data.schema import CategoricalFeature, Schema, Task
from ranker.models.sharded_embeddings import ShardedTables
from ranker.models.sharding import ShardingSettings
from ranker.runs.checkpoint_files import shards_of
from ranker.runs.run_folder import SHARDED
from ranker.training import sharded_checkpoint, stored_tables
from ranker.training.sharded_tables import TablesOfRun
from sharded_support import on_ranks
from support import ROOT

pytest.importorskip("torchrec", reason="make test-torchrec installs it and runs this")
SMALL, LARGE = 100_000, 4_000_000


def measured(rows: int, *words: str) -> dict[str, float]:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "bench_sharded.py"), f"--rows={rows}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_share_the_memory_and_a_step_does_not_know_the_size_of_the_table() -> None:
    local = [measured(rows, "--local") for rows in (SMALL, LARGE)]
    ranks = [measured(rows) for rows in (SMALL, LARGE)]
    rowwise = [measured(rows, "--optimizer=rowwise_adagrad") for rows in (SMALL, LARGE)]

    def grown(found: list[dict[str, float]]) -> float:
        return found[1]["peak_mib"] - found[0]["peak_mib"]

    assert grown(local) > 400  # 4e6 * 16 * 4 bytes, and accumulators
    assert grown(ranks) < 0.6 * grown(local)
    assert grown(rowwise) < 0.4 * grown(local)
    assert ranks[1]["step_cpu_ms"] < 2 * ranks[0]["step_cpu_ms"]  # of a table of forty times the rows


LARGEST = Schema(
    name="one",
    time_column="time",
    dense=(),
    categorical=(CategoricalFeature(name="user", num_embeddings=2_000_000, embedding_dim=16),),
    tasks=(Task(name="click"),),
)
TABLE_MB = 128  # of its weights; as much of accumulators


def tables(plan: str) -> ShardedTables:
    made = ShardedTables(LARGEST, ShardingSettings(plan=plan, init="by_block"), seed=1, lr=0.1)
    made.shard(dist.group.WORLD, torch.device("cpu"))
    return made


def write(checkpoint: str) -> None:
    folder = shards_of(Path(checkpoint))
    sharded_checkpoint.save(tables("table_wise").collection.sharded_state(), folder, dist.group.WORLD)
    parameter = stored_tables.parameter_of(16)
    weight = torch.rand(LARGEST.categorical[0].rows, 16)
    group = {"params": [0], "param_names": [parameter]}
    optimizer = {"state": {0: {"sum": torch.rand_like(weight)}}, "param_groups": [group]}
    torch.save({"state_dict": {f"net.{parameter}": weight}, "optimizer_states": [optimizer]}, checkpoint)


def anonymous_mb() -> float:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def taken_over(checkpoint: str) -> list[float]:
    """Memory that two warm starts take beyond the shards: from sharded tables, and from local ones."""
    run, found = TablesOfRun(tables("row_wise"), {"lr": 0.1}), []
    owners = {SHARDED: {"tables": [["user", LARGEST.categorical[0].rows, 16]]}}
    parents: list[Any] = [
        stored_tables.of_sharded(owners, Path(checkpoint)),
        stored_tables.of_local(Path(checkpoint), LARGEST),
    ]
    for parent in parents:
        kept, _ = run.kept_rows(LARGEST, LARGEST, parent)
        before, most, done = anonymous_mb(), [0.0], threading.Event()

        def watch(before: float = before, most: list[float] = most, done: threading.Event = done) -> None:
            while not done.is_set():
                most[0] = max(most[0], anonymous_mb() - before)
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        run.take_over(parent, kept, lambda _, sums: sums)
        done.set()
        watcher.join()
        found.append(most[0])
        shard = run.tables.collection.shards[0]
        rows_N = torch.arange(5) + shard.row
        assert torch.equal(shard.weight[:5], parent["user"].weight.read(rows_N, 0, 16))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_warm_start_holds_a_block_of_a_table_and_not_the_table(tmp_path: Path) -> None:
    on_ranks(write, 1, tmp_path, str(tmp_path / "step=1.ckpt"))

    for found in on_ranks(taken_over, 2, tmp_path, str(tmp_path / "step=1.ckpt")):
        assert max(found) < TABLE_MB / 3, found
