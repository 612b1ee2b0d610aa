"""Two processes for tests of sharded tables, and a schema with every kind of feature."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ranker.data.batch import Batch, Ragged
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task

SCHEMA = Schema(
    name="sharded",
    time_column="time",
    dense=(DenseFeature(name="d"),),
    categorical=(
        CategoricalFeature(name="user", num_embeddings=60, embedding_dim=8),
        CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=13, embedding_dim=8),
        CategoricalFeature(name="item", num_embeddings=31, embedding_dim=16),
        CategoricalFeature(name="history", kind="sequence", table="item", embedding_dim=16, max_length=5),
        CategoricalFeature(name="tab", num_embeddings=1, embedding_dim=8),
    ),
    tasks=(Task(name="click"), Task(name="like")),
)


def rows(count: int, seed: int) -> Batch:
    """Random rows, with ids that repeat, and empty lists."""
    drawn = torch.Generator().manual_seed(seed)

    def lists(size: int) -> Ragged:
        lengths = torch.randint(0, 4, (count,), generator=drawn)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return Ragged(torch.randint(size, (int(offsets[-1]),), generator=drawn), offsets)

    ids = [torch.randint(f.rows, (count,), generator=drawn) for f in SCHEMA.one_hot]
    labels = (torch.rand(count, 2, generator=drawn) < 0.3).float()
    return Batch(
        dense_BF=torch.randn(count, 1, generator=drawn),
        onehot_BC=torch.stack(ids, dim=1),
        ragged={"tags": lists(14), "history": lists(32)},
        labels_BT=labels,
        mask_BT=torch.ones(count, 2, dtype=torch.bool),
        time_ms_B=torch.arange(count),
        row_B=torch.arange(count),
    )


def on_ranks(work: Callable[..., Any], world: int, folder: Path, *given: Any) -> list[Any]:
    """What ``work(*given)`` returns in each of ``world`` processes of one group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrec", "torchrec.distributed.planner", "ranker.training.module"])
    meeting = folder / f"meeting{len(list(folder.glob('meeting*')))}"
    processes = [context.Process(target=_rank, args=(work, rank, world, str(meeting), given)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    failed = "\n".join(path.read_text() for path in sorted(folder.glob(f"{meeting.name}.*.error")))
    assert not failed, failed
    return [torch.load(f"{meeting}.{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(work: Callable[..., Any], rank: int, world: int, meeting: str, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        torch.save(work(*given), f"{meeting}.{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{meeting}.{rank}.error").write_text(traceback.format_exc())
        raise
