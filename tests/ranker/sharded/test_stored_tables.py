"""Tables of an earlier run, read a few rows at a time: what is read is what is there, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ranker.data.schema import Schema
from ranker.errors import UserError
from ranker.models.sharded_embeddings import ShardedTables
from ranker.models.sharding import ShardingSettings
from ranker.runs.checkpoint_files import shards_of
from ranker.runs.run_folder import SHARDED
from ranker.training import sharded_checkpoint, sharded_tables, stored_tables
from ranker.training.sharded_tables import TablesOfRun
from sharded_support import SCHEMA, made, on_ranks, rows, whole

pytest.importorskip("torchrec", reason="make test-torchrec installs it and runs this")

GROWN = Schema.from_dict(
    SCHEMA.to_dict()
    | {
        "categorical": [
            {**feature, "num_embeddings": 90} if feature["name"] == "user" else feature
            for feature in SCHEMA.to_dict()["categorical"]
            if feature["name"] != "tab"
        ]
    },
    source="test",
)
PLANS = ("row_wise", "table_wise", "column_wise")
OPTIMIZERS = ("adagrad", "rowwise_adagrad")
Whole = dict[str, dict[str, Tensor]]


def contents(tables: Any) -> Whole:
    return {part: whole(tables, part) for part in ("weight", "accumulator")}


def write(folder: str) -> dict[str, Whole]:
    found = {}
    for plan in PLANS:
        for optimizer in OPTIMIZERS:
            tables = made(plan=plan, optimizer=optimizer)
            tables.shard(dist.group.WORLD, torch.device("cpu"))
            tables(rows(16, 1)).pow(2).sum().backward()
            name = f"{plan}-{optimizer}"
            sharded_checkpoint.save(tables.collection.sharded_state(), shards_of(Path(folder, name)), dist.group.WORLD)
            found[name] = contents(tables)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Whole]]:
    """Tables of two processes on the disk, under each plan, and what they hold."""
    folder = tmp_path_factory.mktemp("written")
    return folder, on_ranks(write, 2, folder, str(folder))[0]


def stored(folder: Path, name: str) -> dict[str, stored_tables.StoredTable]:
    owners = [[f.name, f.rows, f.embedding_dim] for f in SCHEMA.categorical if not f.table]
    return stored_tables.of_sharded({SHARDED: {"tables": owners}}, folder / name)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_rows_and_columns_are_read(written: tuple[Path, dict[str, Whole]], plan: str, optimizer: str) -> None:
    folder, held = written
    for name, table in stored(folder, f"{plan}-{optimizer}").items():
        there = held[f"{plan}-{optimizer}"]
        places = torch.randperm(table.rows)[:40]
        assert table.accumulator is not None
        assert table.by_row == (optimizer == "rowwise_adagrad")
        for column, width in ((0, table.dim), (table.dim // 2, table.dim // 2), (2, 3)):
            cut = places, slice(column, column + width)
            assert torch.equal(table.weight.read(places, column, width), there["weight"][name][cut]), name
            assert torch.equal(table.accumulator.read(places, column, width), there["accumulator"][name][cut]), name
            mean = table.accumulators_of_rows(places, column, width)
            torch.testing.assert_close(mean, there["accumulator"][name][cut].mean(1))
    by_width = stored_tables.whole(stored(folder, f"{plan}-{optimizer}").values(), "accumulator")
    joined = torch.cat([there["accumulator"][name] for name in ("user", "tags", "tab")])
    assert torch.equal(by_width["embeddings.tables.dim_8.weight"], joined)


def started(folder: str, name: str, settings: dict[str, Any]) -> tuple[Whole, Whole, list[str], int]:
    """Tables of another schema that start from stored ones: before, after, what is said, the most rows at a time."""
    stored_tables.BLOCK = sharded_tables.BLOCK = 16
    most, read = 0, stored_tables.Stored.read

    def counted(self: stored_tables.Stored, rows_N: Tensor, column: int, width: int) -> Tensor:
        nonlocal most
        most = max(most, len(rows_N))
        return read(self, rows_N, column, width)

    stored_tables.Stored.read = counted  # type: ignore[method-assign]  # in this process, which ends
    tables = ShardedTables(GROWN, ShardingSettings(**settings), seed=9, lr=0.1)
    tables.shard(dist.group.WORLD, torch.device("cpu"))
    before = contents(tables)
    run = TablesOfRun(tables, {"lr": 0.1})
    there = stored(Path(folder), name)
    kept, fresh = run.kept_rows(GROWN, SCHEMA, there)
    run.take_over(there, kept, lambda _, sums: sums)
    return before, contents(tables), [*fresh, *run.other_accumulators(there, kept)], most


@pytest.mark.parametrize(
    ("wrote", "settings"),
    [
        ("row_wise-adagrad", {"plan": "column_wise"}),
        ("column_wise-rowwise_adagrad", {"plan": "row_wise", "optimizer": "rowwise_adagrad"}),
        ("table_wise-adagrad", {"plan": "row_wise", "optimizer": "rowwise_adagrad"}),
        ("row_wise-rowwise_adagrad", {"plan": "table_wise"}),
    ],
)
def test_known_rows_move_into_the_shards_of_other_tables(
    written: tuple[Path, dict[str, Whole]], tmp_path: Path, wrote: str, settings: dict[str, Any]
) -> None:
    folder, held = written

    before, after, lines, most = on_ranks(started, 2, tmp_path, str(folder), wrote, settings)[0]

    assert lines[0] == "the table of 'user': 30 new rows"
    assert most == 16  # of tables of 91 rows
    there, by_row = held[wrote], settings.get("optimizer") == "rowwise_adagrad"
    for name in ("user", "tags", "item"):
        known = len(there["weight"][name])
        assert torch.equal(after["weight"][name][:known], there["weight"][name]), name
        sums = there["accumulator"][name]
        wanted = sums.mean(1, keepdim=True).expand_as(sums) if by_row else sums
        torch.testing.assert_close(after["accumulator"][name][:known], wanted, msg=name)
        for part in ("weight", "accumulator"):
            assert torch.equal(after[part][name][known:], before[part][name][known:]), (part, name)
    changed = wrote.endswith("-rowwise_adagrad") != by_row
    ways = ("one a row", "one a weight") if not by_row else ("one a weight", "one a row")
    assert lines[1:] == ([f"accumulators of 3 tables were {ways[0]} there and are {ways[1]} here"] if changed else [])


def test_damaged_or_other_tables_are_refused(written: tuple[Path, dict[str, Whole]]) -> None:
    folder, _ = written
    owners = [["user", 61, 8], ["item", 33, 16]]
    with pytest.raises(UserError, match=r"has not every row of the table of 'item', 33 of 16 columns"):
        stored_tables.of_sharded({SHARDED: {"tables": owners}}, folder / "row_wise-adagrad")
    with pytest.raises(UserError, match=r"the table of 'nobody' \(KeyError"):
        stored_tables.of_sharded({SHARDED: {"tables": [["nobody", 1, 4]]}}, folder / "row_wise-adagrad")


def test_tables_among_the_weights_of_a_net_are_read_as_they_are() -> None:
    net = {
        "embeddings.tables.dim_8.weight": torch.rand(61 + 14 + 2, 8),
        "embeddings.tables.dim_16.weight": torch.rand(32, 16),
    }

    found = stored_tables.of_weights(net, SCHEMA, Path("export"))

    eight, places = net["embeddings.tables.dim_8.weight"], torch.tensor([13, 0, 7])
    assert torch.equal(found["tags"].weight.read(places, 2, 3), eight[61:75][places, 2:5])
    assert torch.equal(found["item"].weight.read(places, 0, 16), net["embeddings.tables.dim_16.weight"][places])
    assert [table.accumulator for table in found.values()] == [None] * 4
    with pytest.raises(
        UserError, match=r"dim_8.weight of export has not the 77 rows of 8 columns that its schema says"
    ):
        stored_tables.of_weights({**net, "embeddings.tables.dim_8.weight": eight[1:]}, SCHEMA, Path("export"))
