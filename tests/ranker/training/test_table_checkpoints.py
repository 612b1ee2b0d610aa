"""Checkpoints that hold the rows that moved: read back, they are the whole checkpoints, whatever happened before."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ranker.capsules.training_state import copied
from ranker.errors import UserError
from ranker.export.release import Weights
from ranker.runs import table_files
from ranker.runs.checkpoint_files import by_step, damage, newest_intact
from ranker.runs.table_files import COPIES, copy_of, read_copy, write_copy
from ranker.training import table_checkpoints
from ranker.training.checkpoints import Checkpoints
from ranker.training.resumption import Resumption
from ranker.training.table_checkpoints import DurableCheckpointIO, read_checkpoint
from ranker.training.warm_start import Parent

Fit = Callable[..., pl.Trainer]
TABLE = "net.embeddings.tables.dim_4.weight"


def by_rows(full_share: float = 0.25) -> DurableCheckpointIO:
    return DurableCheckpointIO(rows_above=1e-6, full_share=full_share)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def assert_same(folder: Path, other: Path) -> None:
    assert [path.name for path in by_step(folder)] == [path.name for path in by_step(other)]
    for path in by_step(folder):
        found, expected = read_checkpoint(path), read_checkpoint(other / path.name)
        for key in ("state_dict", "optimizer_states", "global_step", "RankingDataModule"):
            assert same(found[key], expected[key]), (path, key)


class GoBack(Callback):
    """Puts the weights of an earlier step back, as a rollback does."""

    def __init__(self, to: int, at: int) -> None:
        self._to, self._at, self._state = to, at, {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step == self._to:
            self._state = copied(module.net.state_dict())
        if trainer.global_step == self._at:
            module.net.load_state_dict(self._state)


@pytest.mark.parametrize("full_share", [0.05, 0.9])
def test_they_are_the_checkpoints_that_hold_everything(fit: Fit, tmp_path: Path, full_share: float) -> None:
    fit([Checkpoints(tmp_path / "rows", every=7)], sparse=True, plugins=[by_rows(full_share)])
    fit([Checkpoints(tmp_path / "whole", every=7)], sparse=True, plugins=[DurableCheckpointIO()])

    assert_same(tmp_path / "rows", tmp_path / "whole")
    copies = {copy_of(path) for path in by_step(tmp_path / "rows")}
    assert {path for path in (tmp_path / "rows" / COPIES).iterdir() if path not in copies} == set()
    begun = {int(path.name.split("-")[0].removeprefix("from=")) for path in copies if path}
    assert begun == {1} if full_share == 0.9 else min(begun) > 1, "how often a full copy is made"


def test_rows_may_move_while_the_full_copy_is_written(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def slowly(tensor: Tensor) -> list[tuple[int, int]]:
        def places() -> Any:
            for start in range(0, len(tensor), 64):
                time.sleep(0.01)
                yield start, min(start + 64, len(tensor))
            seen.append(len(tensor))

        return places()  # type: ignore[no-any-return]

    with monkeypatch.context() as patched:
        patched.setattr(table_files, "_pieces", slowly)
        fit([Checkpoints(tmp_path / "rows", every=16)], sparse=True, plugins=[by_rows(0.9)])
    assert len(seen) >= 2, "the table and its accumulators"
    monkeypatch.setattr(
        table_files,
        "_pieces",
        lambda tensor: [(start, min(start + 64, len(tensor))) for start in range(0, len(tensor), 64)],
    )
    fit([Checkpoints(tmp_path / "whole", every=16)], sparse=True, plugins=[DurableCheckpointIO()])
    assert_same(tmp_path / "rows", tmp_path / "whole")


def test_a_resumed_run_goes_on_from_the_full_copy_and_ends_with_the_same_bits(fit: Fit, tmp_path: Path) -> None:
    whole = fit([Checkpoints(tmp_path / "whole", every=10)], sparse=True, plugins=[DurableCheckpointIO()])
    folder = tmp_path / "rows"
    fit([Checkpoints(folder, every=10)], sparse=True, plugins=[by_rows(0.9)], max_steps=20)
    for limit in (30, -1):  # twice, since the second checkpoint adds to the copy that the first attempt wrote
        found = by_step(folder)[-1]
        checkpoints = Checkpoints(folder, every=10)
        checkpoints.continue_from(int(found.stem.removeprefix("step=")))
        again = fit([checkpoints], sparse=True, plugins=[by_rows(0.9)], max_steps=limit, ckpt_path=str(found))

    assert same(again.lightning_module.net.state_dict(), whole.lightning_module.net.state_dict())
    assert_same(folder, tmp_path / "whole")
    assert len(list((folder / COPIES).iterdir())) == 1, "one full copy for all attempts"


def test_after_weights_were_put_back_a_new_full_copy_is_made(fit: Fit, tmp_path: Path) -> None:
    for name, plugin in (("rows", by_rows(0.9)), ("whole", DurableCheckpointIO())):
        fit([GoBack(to=12, at=25), Checkpoints(tmp_path / name, every=10)], sparse=True, plugins=[plugin])
    assert_same(tmp_path / "rows", tmp_path / "whole")


def test_tables_with_dense_gradients_or_below_the_limit_are_saved_whole(fit: Fit, tmp_path: Path) -> None:
    fit([Checkpoints(tmp_path / "dense", every=24)], plugins=[by_rows()])
    fit([Checkpoints(tmp_path / "small", every=24)], sparse=True, plugins=[DurableCheckpointIO(rows_above=1.0)])
    for folder in (tmp_path / "dense", tmp_path / "small"):
        assert TABLE in torch.load(by_step(folder)[-1], weights_only=True)["state_dict"]
        assert not (folder / COPIES).exists()


def test_a_missing_or_damaged_full_copy_is_found_before_it_is_used(fit: Fit, tmp_path: Path) -> None:
    trainer = fit([Checkpoints(tmp_path, every=24)], sparse=True, plugins=[by_rows(0.9)])
    newest = by_step(tmp_path)[-1]
    (copy,) = (tmp_path / COPIES).iterdir()
    assert damage(newest) is None
    assert newest_intact(tmp_path, say=print) == newest
    module = trainer.lightning_module
    with pytest.MonkeyPatch.context() as patched:  # what a resume checks first reads no table
        patched.setattr(table_checkpoints, "read_copy", None)
        assert Resumption.of(newest, module).step == 48

    alone = tmp_path / "elsewhere" / "folder"
    alone.mkdir(parents=True)
    shutil.copy(newest, alone)
    assert "is missing" in str(damage(alone / newest.name))
    with pytest.raises(UserError, match=r"full copy .* is missing"):
        read_checkpoint(alone / newest.name)

    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    assert f"{copy.name}, is damaged" in str(damage(newest))
    with pytest.raises(UserError, match="no full copy of tables, or is damaged"):
        read_checkpoint(newest)
    with pytest.raises(UserError, match="is intact"):
        newest_intact(tmp_path, say=print)


def test_exports_and_warm_starts_read_them(fit: Fit, tmp_path: Path) -> None:
    trainer = fit([Checkpoints(tmp_path, every=24)], sparse=True, plugins=[by_rows(0.9)])
    table = trainer.lightning_module.net.embeddings.tables["dim_4"].weight.detach()

    newest = by_step(tmp_path)[-1]
    assert torch.equal(Weights.read(newest).net[TABLE.removeprefix("net.")], table)
    parent = Parent.of_checkpoint(newest)
    assert torch.equal(parent.net[TABLE.removeprefix("net.")], table)
    assert any(
        state.get("sum") is not None and state["sum"].shape == table.shape for state in parent.optimizer.values()
    )


def test_a_full_disk_is_said_in_one_line_and_earlier_checkpoints_stay(
    fit: Fit, tmp_path: Path, disk_full_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    class Limit(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step == 25:
                self.limited = disk_full_after(1000)
                self.limited.__enter__()

    def trained() -> None:
        try:
            fit([limit, Checkpoints(tmp_path, every=10)], sparse=True, plugins=[by_rows(0.9)])
        finally:
            limit.limited.__exit__(None, None, None)

    limit = Limit()
    with pytest.raises(UserError, match=r"step=30\.ckpt cannot be written"):
        trained()
    assert [path.name for path in by_step(tmp_path)] == ["step=10.ckpt", "step=20.ckpt"]
    assert [damage(path) for path in by_step(tmp_path)] == [None, None]


def test_what_a_killed_process_left_is_removed(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / COPIES).mkdir()
    left = [tmp_path / COPIES / ".from=3-00000000.zip.99.tmp", tmp_path / COPIES / "from=3-00000000.zip"]
    for path in left:
        path.write_bytes(b"half")
    fit([Checkpoints(tmp_path, every=24)], sparse=True, plugins=[by_rows(0.9)])
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_full_copy_is_read_back_bit_by_bit(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "PIECE_BYTES", 100)
    tensors = {"a:weight": torch.randn(57, 3).to(dtype), "a/sum": torch.randn(57, 3), "one": torch.randn(1, 40)}
    write_copy(tmp_path / "copy.zip", tensors)
    found = read_copy(tmp_path / "copy.zip")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
