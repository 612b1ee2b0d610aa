"""Sharded tables give the numbers of local ones: embeddings, losses, weights and accumulators, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import optim
from ranker.data.windows import share
from ranker.models.embeddings import EmbeddingTables, Tables, place
from ranker.models.sharded_embeddings import ShardedTables
from ranker.models.sharding import ShardingSettings
from sharded_support import SCHEMA, on_ranks, rows

pytest.importorskip("torchrec", reason="make test-torchrec installs it and runs this")

SIZES = (24, 24, 3, 1, 24)  # rows of the batches over all ranks: with two ranks, one of them has no row of the fourth
LR, EPS, G_0 = 0.3, 1e-8, 1e-3


def whole(tables: ShardedTables, part: str) -> dict[str, Tensor]:
    """The tables of all ranks, or their accumulators, put together by the places that the shards say they have."""
    parts: list[Any] = [None] * dist.get_world_size()
    own = [(s.table, s.row, s.column, getattr(s, part).clone()) for s in tables.collection.shards]
    dist.all_gather_object(parts, own)
    sizes = {t.name: (t.rows, t.dim) for t in tables.tables}
    found = {name: torch.full(size, torch.nan) for name, size in sizes.items()}
    for name, row, column, values in (shard for shards in parts for shard in shards):
        height, width = values.shape if values.dim() == 2 else (len(values), found[name].shape[1])
        place_in = found[name][row : row + height, column : column + width]
        place_in.copy_(values if values.dim() == 2 else values[:, None].expand(height, width))
    return found


def train(plan: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(5)
    settings = ShardingSettings(initial_accumulator_value=G_0, eps=EPS, **plan)
    tables = ShardedTables(SCHEMA, settings, seed=5, lr=LR)
    layer = nn.Linear(1 + tables.output_width, 2)
    tables.shard(dist.group.WORLD, torch.device("cpu"))
    rank, world = dist.get_rank(), dist.get_world_size()

    def average(parameters: Any) -> None:
        for p in parameters:
            dist.all_reduce(p.grad)
            p.grad /= world

    losses = fit(tables, layer, lambda batch, n: batch.slice(*share(n, rank=rank, world_size=world)), world, average)
    with torch.no_grad():
        losses = torch.stack(losses)
        dist.all_reduce(losses)
    tables.eval()
    return {
        "losses": losses / world,
        "weight": whole(tables, "weight"),
        "accumulator": whole(tables, "accumulator"),
        "layer": layer.weight.detach(),
        "plan": tables.collection.plan,
        "shards": [(s.table, s.row, s.column, tuple(s.weight.shape)) for s in tables.collection.shards],
    }


def fit(tables: Tables, layer: nn.Linear, part_of: Any, world: int, average: Any) -> list[Tensor]:
    adagrad = {"lr": LR, "eps": EPS, "initial_accumulator_value": G_0}
    own = optim.build_optimizer("adagrad", [*layer.parameters(), *tables.parameters()], **adagrad)
    losses = []
    for step, size in enumerate(SIZES):
        if step == 3:  # a schedule
            for group in own.param_groups:
                group["lr"] = LR / 2
            if isinstance(tables, ShardedTables):
                tables.set_learning_rate(LR / 2)
        batch = part_of(rows(size, step), size)
        x_BD = torch.cat([batch.dense_BF, tables(batch)], dim=1)
        # As MultitaskLoss: the sum over this rank's rows by the rows of all ranks, times the ranks, as DDP averages.
        loss = F.binary_cross_entropy_with_logits(layer(x_BD), batch.labels_BT, reduction="sum") * world / size
        own.zero_grad()
        loss.backward()
        average(layer.parameters())
        own.step()
        losses.append(loss.detach())
    return losses


def local() -> dict[str, Any]:
    torch.manual_seed(5)
    tables = EmbeddingTables(SCHEMA)
    layer = nn.Linear(1 + tables.output_width, 2)
    start = {name: p.detach().clone() for name, p in tables.named_parameters()}
    adagrad = {"lr": LR, "eps": EPS, "initial_accumulator_value": G_0}
    losses = fit(tables, layer, lambda batch, _: batch, 1, lambda _: None)
    first, _ = place(SCHEMA)
    cut = {
        f.name: tables.tables[f"dim_{f.embedding_dim}"].weight.detach()[first[f.name] : first[f.name] + f.rows]
        for f in SCHEMA.categorical
        if not f.table
    }
    return {"losses": torch.stack(losses), "weight": cut, "layer": layer.weight.detach(), "start": start} | adagrad


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("plan", ["table_wise", "row_wise", "column_wise", "mixed"])
def test_they_train_as_local_ones(tmp_path: Path, plan: str, world: int) -> None:
    given = (
        {"plan": "row_wise", "tables": {"item": "column_wise", "tab": "table_wise"}}
        if plan == "mixed"
        else {"plan": plan}
    )

    found = on_ranks(train, world, tmp_path, given)

    alone = local()
    for rank in found:
        torch.testing.assert_close(rank["losses"], alone["losses"])
        torch.testing.assert_close(rank["layer"], alone["layer"])
        for name, values in alone["weight"].items():
            torch.testing.assert_close(rank["weight"][name], values, msg=lambda text, name=name: f"{name}: {text}")
    places = [place for rank in found for place in rank["shards"]]
    assert len(places) == len(set(places))
    user = sorted(shape for name, *_, shape in places if name == "user")
    wanted = {"table_wise": [(61, 8)], "row_wise": [(30, 8), (31, 8)], "column_wise": [(61, 4)] * 2}
    assert user == (wanted["row_wise" if plan == "mixed" else plan] if world == 2 else [(61, 8)])
