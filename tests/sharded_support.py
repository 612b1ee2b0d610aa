"""Two processes for tests of sharded tables, and a schema with every kind of feature."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from ranker.data.batch import Batch, Ragged
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.models.sharded_embeddings import ShardedTables
from ranker.models.sharding import ShardingSettings
from support import ROOT

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


def made(*, lr: float = 0.3, seed: int = 5, **settings: Any) -> ShardedTables:
    """Tables that are not sharded yet."""
    return ShardedTables(SCHEMA, ShardingSettings(**settings), seed=seed, lr=lr)


def whole(tables: ShardedTables, part: str) -> dict[str, Tensor]:
    """The tables of all ranks, or their accumulators, put together by the places that the shards say they have."""
    parts: list[Any] = [None] * dist.get_world_size()
    own = [(s.table, s.row, s.column, s.weight.shape, getattr(s, part).clone()) for s in tables.collection.shards]
    dist.all_gather_object(parts, own)
    found = {t.name: torch.full((t.rows, t.dim), torch.nan) for t in tables.tables}
    for name, row, column, (height, width), values in (shard for shards in parts for shard in shards):
        place_in = found[name][row : row + height, column : column + width]
        place_in.copy_(values if values.dim() == 2 else values[:, None].expand(height, width))
    return found


PRELOAD = ["torchrec", "torchrec.distributed.planner", "torchrec.distributed.embeddingbag", "ranker.run"]


def started(target: Callable[..., Any], world: int, *given: Any) -> list[Any]:
    """Processes that have torchrec imported already: ``target(rank, world, *given)`` in each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [context.Process(target=target, args=(rank, world, *given)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def on_ranks(work: Callable[..., Any], world: int, folder: Path, *given: Any) -> list[Any]:
    """What ``work(*given)`` returns in each of ``world`` processes of one group."""
    meeting = folder / f"meeting{len(list(folder.glob('meeting*')))}"
    for process in started(_rank, world, work, str(meeting), given):
        process.join(300)
    failed = "\n".join(path.read_text() for path in sorted(folder.glob(f"{meeting.name}.*.error")))
    assert not failed, failed
    return [torch.load(f"{meeting}.{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, work: Callable[..., Any], meeting: str, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        torch.save(work(*given), f"{meeting}.{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{meeting}.{rank}.error").write_text(traceback.format_exc())
        raise


def command_on_ranks(words: Sequence[str], world: int) -> list[Any]:
    """Starts train.py as torchrun does: ``world`` processes that know their ranks from the environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return started(_command, world, port, list(words))


def trained(*overrides: str, world: int = 2) -> None:
    """Runs train.py on so many ranks."""
    assert ended(command_on_ranks(overrides, world)) == 0


def ended(ranks: Sequence[Any]) -> int:
    """Waits for ranks; the first exit status that is not 0, after which the others are killed."""
    while any(rank.is_alive() for rank in ranks):
        ranks[0].join(0.1)
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
    for rank in ranks:
        rank.join()
    return next((rank.exitcode for rank in ranks if rank.exitcode), 0)


def _command(rank: int, world: int, port: int, words: list[str]) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(place) for name, place in places.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    rank_zero_only.rank = rank  # Lightning read it from the environment when it was imported
    sys.argv = [str(ROOT / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")
