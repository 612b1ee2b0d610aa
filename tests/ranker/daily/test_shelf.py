from __future__ import annotations

import json
from pathlib import Path

import torch

from ranker.daily.shelf import Shelf
from ranker.runs.checkpoint_files import SHARD_FILES, checksum, damage, shards_of
from ranker.runs.table_files import COPIES, note_copy, write_copy


def test_a_state_is_kept_with_the_full_copy_that_its_checkpoint_adds_to(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint = folder / "step=7.ckpt"
    with checkpoint.open("wb") as file:
        torch.save({"global_step": 7}, file)
    note_copy(checkpoint, "from=1-0000.zip")
    write_copy(folder / COPIES / "from=1-0000.zip", {"table/weight": torch.ones(3, 2)})

    shelf = Shelf(tmp_path / "daily")
    shelf.keep_state("2026-01-01", tmp_path / "run", checkpoint)

    assert damage(shelf.state("2026-01-01") / "checkpoints" / "step=7.ckpt") is None


def test_a_state_is_kept_with_its_sharded_tables(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    checkpoint = folder / "step=7.ckpt"
    shards = shards_of(checkpoint)
    shards.mkdir(parents=True)
    torch.save({"global_step": 7}, checkpoint)
    (shards / "__0_0.distcp").write_bytes(b"rows")
    files = {"__0_0.distcp": [4, checksum(shards / "__0_0.distcp")]}
    (shards / SHARD_FILES).write_text(json.dumps(files))

    shelf = Shelf(tmp_path / "daily")
    shelf.keep_state("2026-01-01", tmp_path / "run", checkpoint)

    kept = shelf.state("2026-01-01") / "checkpoints" / "step=7.ckpt"
    assert damage(kept) is None
    assert (shards_of(kept) / "__0_0.distcp").read_bytes() == b"rows"
