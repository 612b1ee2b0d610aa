from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from ranker.data.schema import DenseFeature, Schema, Task
from ranker.metrics import StreamingAUC, TaskMetrics

SCHEMA = Schema(
    name="toy",
    time_column="t",
    dense=(DenseFeature(name="x"),),
    tasks=(Task(name="click"), Task(name="watch", type="regression"), Task(name="like")),
)
CASES = {"uneven": 45, "one_rank_empty": 60}  # rows of rank 0 out of 60


def some_rows(seed):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 3, generator=draw)
    labels = (torch.rand(60, 3, generator=draw) < 0.4).float()
    return logits, labels, torch.rand(60, 3, generator=draw) < 0.7


def test_two_ranks_give_what_one_process_gives_on_all_rows(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]

    metrics, stream = TaskMetrics(SCHEMA), StreamingAUC(SCHEMA)
    for seed in (0, 1):
        metrics.update(*some_rows(seed))
        stream.update(*some_rows(seed))
    for case in CASES:
        for rank in range(2):
            result = torch.load(tmp_path / f"{case}_{rank}.pt", weights_only=True)
            assert result["exact"] == pytest.approx(metrics.compute())
            torch.testing.assert_close(result["auc_T"], stream.stats().auc_T, equal_nan=True)
            assert result["nonfinite_T"].tolist() == [0.0] * 3


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for case, cut in CASES.items():
        metrics, stream = TaskMetrics(SCHEMA), StreamingAUC(SCHEMA)
        for seed in (0, 1):
            own = [part[:cut] if rank == 0 else part[cut:] for part in some_rows(seed)]
            if len(own[0]):  # a rank without rows never updates
                metrics.update(*own)
                stream.update(*own)
        stats = stream.stats()
        result = {"exact": metrics.compute(), "auc_T": stats.auc_T, "nonfinite_T": stats.nonfinite_T}
        torch.save(result, f"{folder}/{case}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
