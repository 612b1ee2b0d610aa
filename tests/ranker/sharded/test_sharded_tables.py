"""Sharded tables give the numbers of local ones: embeddings, losses, weights and accumulators, step by step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
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
from ranker.training.sharded_tables import TablesOfRun
from sharded_support import SCHEMA, made, on_ranks, rows, whole

pytest.importorskip("torchrec", reason="make test-torchrec installs it and runs this")

SIZES = (24, 24, 3, 1, 24)  # rows of the batches over all ranks: with two ranks, one of them has no row of the fourth
LR, EPS, G_0 = 0.3, 1e-8, 1e-3


def train(plan: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(5)
    tables = made(lr=LR, initial_accumulator_value=G_0, eps=EPS, **plan)
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


def rowwise(plan: str) -> dict[str, Any]:
    torch.manual_seed(5)
    tables = made(lr=LR, initial_accumulator_value=G_0, eps=EPS, optimizer="rowwise_adagrad", plan=plan)
    tables.shard(dist.group.WORLD, torch.device("cpu"))
    before = whole(tables, "weight")["user"]
    rank, world = dist.get_rank(), dist.get_world_size()
    batch = rows(24, 0).slice(*share(24, rank=rank, world_size=world))
    tables(batch).pow(3).sum().backward()
    return {"before": before, "weight": whole(tables, "weight")["user"], "sum": whole(tables, "accumulator")["user"]}


@pytest.mark.parametrize("plan", ["table_wise", "row_wise"])
def test_row_wise_adagrad_has_one_accumulator_a_row(tmp_path: Path, plan: str) -> None:
    found = on_ranks(rowwise, 2, tmp_path, plan)[0]

    ids, before = rows(24, 0).onehot_BC[:, 0], found["before"].clone().requires_grad_()
    F.embedding(ids, before).pow(3).sum().div(2).backward()  # divided by the ranks, as DDP does
    total = G_0 + before.grad.square().mean(1, keepdim=True)
    torch.testing.assert_close(found["sum"], total.expand_as(before))
    torch.testing.assert_close(found["weight"], before.detach() - LR * before.grad / (total.sqrt() + EPS))


def blocks() -> dict[str, Tensor]:
    torch.manual_seed(5)
    tables = made(init="by_block", plan="row_wise")
    after = torch.rand(1)
    tables.shard(dist.group.WORLD, torch.device("cpu"))
    return whole(tables, "weight") | {"after": after}


def test_weights_drawn_by_block_are_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    (one,), two = on_ranks(blocks, 1, tmp_path), on_ranks(blocks, 2, tmp_path)

    torch.manual_seed(5)
    assert torch.equal(one.pop("after"), torch.rand(1))  # the layers' numbers do not depend on the tables
    for name, values in one.items():
        assert torch.equal(two[0][name], values)
        assert 0.04 < values.abs().max() <= 0.05 or len(values) < 3


def rows_at_a_mark(used: dict[str, list[int]], settings: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """All rows at a mark, and what rank 0 gathers of it after two more steps."""
    tables = made(**settings)
    place_of = SimpleNamespace(root_device=torch.device("cpu"))
    run = TablesOfRun(tables, {})
    run.start(SimpleNamespace(strategy=place_of, is_global_zero=False))  # type: ignore[arg-type]
    part = share(24, rank=dist.get_rank(), world_size=dist.get_world_size())
    tables(rows(24, 1).slice(*part)).pow(2).sum().backward()
    mark = run.mark()
    then = {f"{name}/{part}": x for part in ("weight", "accumulator") for name, x in whole(tables, part).items()}
    for seed in (2, 3):
        tables(rows(24, seed).slice(*part)).pow(2).sum().backward()
    return then, run.rows_at(mark, {name: torch.tensor(found) for name, found in used.items()})


@pytest.mark.parametrize("plan", ["row_wise", "table_wise", "column_wise"])
def test_rank_0_gathers_rows_of_an_earlier_step(tmp_path: Path, plan: str) -> None:
    used = {"user": [0, 1, 7, 30, 31, 60], "tags": [0, 1], "item": [0, 1, 2, 15, 16, 31], "tab": [0, 1]}

    (then, found), (_, nothing) = on_ranks(rows_at_a_mark, 2, tmp_path, used, {"plan": plan})

    assert nothing is None
    for dim, names in ((8, ("user", "tags", "tab")), (16, ("item",))):
        for key, part in (("weight", "weight"), ("sum", "accumulator")):
            wanted = torch.cat([then[f"{name}/{part}"][used[name]] for name in names])
            assert torch.equal(found[dim][key], wanted), (dim, key)
