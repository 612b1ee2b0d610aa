"""Sharded tables on disk: read by any number of ranks under any plan, whole in one process, and refused if damaged."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ranker.data.windows import share
from ranker.errors import UserError
from ranker.models.embeddings import EmbeddingTables
from ranker.runs.checkpoint_files import SHARD_FILES, damage, damage_of_shards
from ranker.runs.run_folder import SHARDED
from ranker.training import sharded_checkpoint, stored_tables
from sharded_support import SCHEMA, made, on_ranks, rows, whole

pytest.importorskip("torchrec", reason="make test-torchrec installs it and runs this")

Whole = dict[str, dict[str, Tensor]]


def step(tables: Any, seed: int) -> None:
    part = share(16, rank=dist.get_rank(), world_size=dist.get_world_size())
    tables(rows(16, seed).slice(*part)).pow(2).sum().backward()


def contents(tables: Any) -> Whole:
    return {part: whole(tables, part) for part in ("weight", "accumulator")}


def written(folder: str, **settings: Any) -> Whole:
    tables = made(**settings)
    tables.shard(dist.group.WORLD, torch.device("cpu"))
    step(tables, 1)
    sharded_checkpoint.save(tables.collection.sharded_state(), Path(folder), dist.group.WORLD)
    found = contents(tables)
    step(tables, 2)  # what is on disk does not follow
    return found


def read(folder: str, settings: dict[str, Any]) -> Whole | str:
    tables = made(seed=9, init="by_block", **settings)
    tables.shard(dist.group.WORLD, torch.device("cpu"))
    try:
        sharded_checkpoint.load(tables.collection.sharded_state(), Path(folder), dist.group.WORLD)
    except UserError as error:
        return str(error)
    return contents(tables)


def write_and_read(folder: str, wrote: dict[str, Any], reads: list[dict[str, Any]]) -> tuple[Whole, list[Whole | str]]:
    return written(folder, **wrote), [read(folder, settings) for settings in reads]


PLANS = ("row_wise", "table_wise", "column_wise")


def test_other_ranks_and_plans_read_the_same_rows(tmp_path: Path) -> None:
    folder = str(tmp_path / "shards" / "step=1")
    plans = [{"plan": plan} for plan in PLANS]

    (before, there), _ = on_ranks(write_and_read, 2, tmp_path, folder, {"plan": "row_wise"}, plans)
    (alone,) = on_ranks(read, 1, tmp_path, folder, {"plan": "table_wise"})

    for found in (*there, alone):
        assert not isinstance(found, str), found
        for part, tables in before.items():
            for name, values in tables.items():
                assert torch.equal(found[part][name], values), (part, name)


def test_accumulators_of_column_wise_parts_need_as_many_parts(tmp_path: Path) -> None:
    folder, rowwise = str(tmp_path / "step=1"), {"optimizer": "rowwise_adagrad"}
    plans = [rowwise | {"plan": "row_wise"}, {"plan": "row_wise"}]

    wrote = rowwise | {"plan": "column_wise"}
    for _, (refused, other) in on_ranks(write_and_read, 2, tmp_path, folder, wrote, plans):
        assert "accumulator is [122] there and [61] here; accumulators of row-wise Adagrad on column-wise" in refused
        assert "user/accumulator is [122] there and [61, 8] here" in other


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Whole]:
    """A checkpoint file with sharded tables beside it, what it says, and what the tables hold."""
    top = tmp_path_factory.mktemp("saved")
    before, _ = on_ranks(write_and_read, 2, top, str(top / "shards" / "step=7"), {"plan": "row_wise"}, [])[0]
    owners = [[f.name, f.rows, f.embedding_dim] for f in SCHEMA.categorical if not f.table]
    torch.save({SHARDED: {"tables": owners}}, top / "step=7.ckpt")
    return top / "step=7.ckpt", {SHARDED: {"tables": owners}}, before


def test_one_process_gathers_what_local_tables_hold(saved: tuple[Path, dict[str, Any], Whole]) -> None:
    path, checkpoint, before = saved
    tables = EmbeddingTables(SCHEMA)

    found = stored_tables.gathered(checkpoint, path)

    tables.load_state_dict({name.removeprefix("embeddings."): value for name, value in found.items()})
    first = {8: ("user", "tags", "tab"), 16: ("item",)}
    for dim, names in first.items():
        wanted = torch.cat([before["weight"][name] for name in names])
        assert torch.equal(tables.tables[f"dim_{dim}"].weight, wanted)
    assert stored_tables.gathered({}, path) == {}


def test_a_damaged_folder_is_found_before_it_is_read(saved: tuple[Path, dict[str, Any], Whole], tmp_path: Path) -> None:
    path, _, _ = saved
    assert damage(path) is None
    folder = path.parent / "shards" / "step=7"
    name = next(name for name in json.loads((folder / SHARD_FILES).read_text()) if name.endswith(".distcp"))
    good = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
        assert f"step=7/{name} is wrong" in str(damage(path))
        (folder / name).unlink()
        assert "without its tables" in str(damage(path))
    finally:
        (folder / name).write_bytes(good)
    assert "No such file" in str(damage_of_shards(tmp_path / "none"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('ran')",)


def test_an_index_runs_no_code(saved: tuple[Path, dict[str, Any], Whole], tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))

    with pytest.raises(UserError, match=r"builtins.exec has no place in an index of tables"):
        sharded_checkpoint.Reader(tmp_path).read_metadata()
