"""Memory and time of a step with one large embedding table, local or sharded over processes. Needs torchrec.

    build/torchrec/bin/python scripts/bench/bench_sharded.py --rows 1e8 --ranks 2
    build/torchrec/bin/python scripts/bench/bench_sharded.py --rows 1e8 --local

Prints one line of JSON: the largest peak memory of a process, the memory that the table and its accumulators took, and
the CPU time of a step (median of --steps, after two that warm up). ``--local`` is ``model.net.sparse_embeddings=true``,
the cheaper of the two ways of a local table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import optim
from ranker.data.batch import Batch
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.models import SharedBottom
from ranker.models.embeddings import tables_made_by
from ranker.models.sharded_embeddings import ShardedTables
from ranker.models.sharding import ShardingSettings

WIDTH, HIDDEN = 16, [64, 64]


def schema(rows: int) -> Schema:
    """One large table and one dense feature."""
    return Schema(
        name="large",
        time_column="time",
        dense=(DenseFeature(name="d"),),
        categorical=(CategoricalFeature(name="id", num_embeddings=rows - 1, embedding_dim=WIDTH),),
        tasks=(Task(name="click"),),
    )


def batch(rows: int, size: int, seed: int) -> Batch:
    """Rows with uniform ids: the worst case for caches."""
    drawn = torch.Generator().manual_seed(seed)
    return Batch(
        dense_BF=torch.randn(size, 1, generator=drawn),
        onehot_BC=torch.randint(rows, (size, 1), generator=drawn),
        ragged={},
        labels_BT=(torch.rand(size, 1, generator=drawn) < 0.3).float(),
        mask_BT=torch.ones(size, 1, dtype=torch.bool),
        time_ms_B=torch.arange(size),
        row_B=torch.arange(size),
    )


def memory(name: str) -> float:
    """VmHWM (peak) or VmRSS (now) of this process, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def measure(asked: dict[str, Any]) -> dict[str, float]:
    """Trains some steps in this process of a group, and measures."""
    torch.set_num_threads(1)
    rows, local = asked["rows"], asked["local"]
    embedding = {"method": "adagrad", "initial_accumulator_value": 1e-6, "eps": 1e-10}
    settings = ShardingSettings(plan="row_wise", optimizer=asked["optimizer"], init="by_block")
    torch.manual_seed(0)
    if local:
        before = memory("VmRSS")
        net = SharedBottom(schema(rows), hidden=HIDDEN, sparse_embeddings=True)
        model: nn.Module = net
    else:
        with tables_made_by(lambda made: ShardedTables(made, settings, seed=0, lr=0.1)):
            net = SharedBottom(schema(rows), hidden=HIDDEN)
        assert isinstance(net.embeddings, ShardedTables)
        assert dist.group.WORLD is not None
        before = memory("VmRSS")
        net.embeddings.shard(dist.group.WORLD, torch.device("cpu"))
        model = DistributedDataParallel(net)
    optimizer = optim.build_optimizer("clippy", net, lr=0.1, embedding=embedding)
    seconds = []
    for step in range(asked["steps"] + 2):
        part = batch(rows, asked["batch"] // dist.get_world_size(), 1000 * step + dist.get_rank())
        start = time.process_time()
        loss = nn.functional.binary_cross_entropy_with_logits(model(part), part.labels_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
        if step == 0:
            table = memory("VmRSS") - before
    return {"peak_mib": memory("VmHWM"), "table_mib": table, "step_cpu_ms": 1e3 * statistics.median(seconds[2:])}


def run(rank: int, ranks: int, meeting: str, asked: dict[str, Any]) -> None:
    """One process."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, measure(asked))
    if rank == 0:
        largest = {name: round(max(one[name] for one in found), 2) for name in found[0]}
        print(json.dumps({**asked, "ranks": ranks, **largest}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Starts the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e7, help="rows of the table; of 16 weights each")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--batch", type=int, default=2048, help="rows of a batch, over all processes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--optimizer", choices=("adagrad", "rowwise_adagrad"), default="adagrad")
    parser.add_argument("--local", action="store_true", help="a local table in one process")
    given = parser.parse_args()
    asked = {name: getattr(given, name) for name in ("batch", "steps", "optimizer", "local")} | {
        "rows": int(given.rows)
    }
    ranks = 1 if given.local else given.ranks
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        places = [(rank, ranks, f"{folder}/meeting", asked) for rank in range(ranks)]
        processes = [context.Process(target=run, args=place) for place in places]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    raise SystemExit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
