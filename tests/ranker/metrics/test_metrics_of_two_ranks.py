from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ranker.data.batch import NO_GROUP, Batch
from ranker.data.schema import CategoricalFeature, DenseFeature, GroupColumn, Schema, Task
from ranker.metrics import (
    MAE,
    MRR,
    NDCG,
    XAUC,
    CalibrationBuckets,
    GroupAUC,
    Intervals,
    Recall,
    SegmentedNE,
    StreamingAUC,
    StreamingStats,
    TaskMetrics,
)

SCHEMA = Schema(
    name="toy",
    time_column="t",
    dense=(DenseFeature(name="x"),),
    tasks=(Task(name="click"), Task(name="watch", type="regression"), Task(name="like")),
)
# The same with weights, users and every metric that is computed from rows.
KEYED = replace(
    SCHEMA,
    weight="w",
    groups=(GroupColumn(name="user"),),
    categorical=(CategoricalFeature(name="hour", num_embeddings=24),),
)
EXTRA = (
    GroupAUC(),
    NDCG(k=[2, 5]),
    Recall(),
    MRR(),
    XAUC(),
    MAE(),
    CalibrationBuckets(buckets=5),
    SegmentedNE(feature="hour", max_segments=4),
)
CASES = {"uneven": 45, "one_rank_empty": 60}  # rows of rank 0 out of 60


def some_rows(seed):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 3, generator=draw)
    labels = (torch.rand(60, 3, generator=draw) < 0.4).float()
    return logits, labels, torch.rand(60, 3, generator=draw) < 0.7


def keyed_rows(seed):
    draw = torch.Generator().manual_seed(seed + 10)
    logits, labels, mask = some_rows(seed)
    keys = torch.randint(0, 9, (60, 1), generator=draw)
    keys[::13] = NO_GROUP
    batch = Batch(
        dense_BF=torch.zeros(60, 1),
        onehot_BC=torch.randint(0, 6, (60, 1), generator=draw),
        ragged={},
        labels_BT=labels,
        mask_BT=mask,
        time_ms_B=torch.arange(60),
        row_B=torch.arange(60),
        weight_B=torch.rand(60, generator=draw) + 0.1,
        groups_BG=keys,
    )
    return logits.round(decimals=1), batch


def final(shares):
    """Values, intervals and tables of some shares of the keyed rows."""
    metrics = TaskMetrics(KEYED, extra=EXTRA, intervals=Intervals(resamples=30))
    stream = StreamingAUC(KEYED)
    for logits, batch in shares:
        if len(batch):  # a rank without rows never updates its metrics; in training it has an empty batch
            metrics.add(logits, batch)
        stream.update(logits, batch.labels_BT, batch.mask_BT, batch.weight_B)
    values = metrics.compute(final=True)
    tables = [table.plain() for table in metrics.tables]
    return {"values": values, "intervals": metrics.intervals, "tables": tables, "stats": list(stream.stats())}


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
    whole = final([keyed_rows(0), keyed_rows(1)])
    assert len(whole["intervals"]) >= 20
    for case in CASES:
        for rank in range(2):
            result = torch.load(tmp_path / f"keyed_{case}_{rank}.pt", weights_only=True)
            assert result["values"] == pytest.approx(whole["values"], rel=1e-9, nan_ok=True)
            assert result["intervals"].keys() == whole["intervals"].keys()
            for name, ends in whole["intervals"].items():
                assert result["intervals"][name] == pytest.approx(ends, rel=1e-9), name
            for one, other in zip(whole["tables"], result["tables"], strict=True):
                assert [one["task"], one["name"], one["columns"]] == [other["task"], other["name"], other["columns"]]
                for row, again in zip(one["rows"], other["rows"], strict=True):
                    assert row[0] == again[0]
                    assert row[1:] == pytest.approx(again[1:], nan_ok=True)
            for name, have, wanted in zip(StreamingStats._fields, result["stats"], whole["stats"], strict=True):
                if name != "spread_T":  # the root of the ranks' mean variance
                    torch.testing.assert_close(have, wanted, equal_nan=True)


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
        shares = []
        for seed in (0, 1):
            logits, batch = keyed_rows(seed)
            own = torch.arange(cut) if rank == 0 else torch.arange(cut, 60)
            shares.append((logits[own], batch.take(own)))
        torch.save(final(shares), f"{folder}/keyed_{case}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
