"""When checkpoints are written and which stay, and that a file is whole or absent."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ranker import stop_signals
from ranker.errors import UserError
from ranker.runs.checkpoint_files import by_step
from ranker.training.checkpoints import Checkpoints
from ranker.training.interruption import Interruption
from ranker.training.table_checkpoints import DurableCheckpointIO

Fit = Callable[..., pl.Trainer]


class StopAt(Callback):
    """Ends training when a batch has ended, or when all batches have."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def names(folder: Path) -> list[str]:
    return [path.name for path in by_step(folder)]


@pytest.mark.parametrize(
    ("every", "settings", "kept"),
    [
        (10, {"max_steps": 23}, ["step=20.ckpt", "step=23.ckpt"]),
        (100, {}, ["step=48.ckpt"]),
        (20, {"accumulate_grad_batches": 5}, ["step=10.ckpt"]),  # 48 batches: 9 steps of 5 and one of 3
        (0, {}, []),
    ],
)
def test_the_last_step_has_a_checkpoint_and_two_are_kept(
    fit: Fit, tmp_path: Path, every: int, settings: dict[str, int], kept: list[str]
) -> None:
    trainer = fit([Checkpoints(tmp_path, every=every)], **settings)

    assert names(tmp_path) == kept
    for path in by_step(tmp_path)[-1:]:
        assert torch.load(path, weights_only=True)["global_step"] == trainer.global_step


def test_a_run_that_a_callback_ends_keeps_its_last_step(fit: Fit, tmp_path: Path) -> None:
    fit([StopAt(7), Checkpoints(tmp_path, every=5)])

    assert names(tmp_path) == ["step=5.ckpt", "step=7.ckpt"]


def test_an_interrupted_run_writes_one_even_where_none_is_asked_for(fit: Fit, tmp_path: Path) -> None:
    class Asked(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)  # Lightning has a handler for SIGTERM

    interruption = Interruption()
    with stop_signals.taken_over():
        fit([Asked(), interruption, Checkpoints(tmp_path, every=0, interruption=interruption)])

    assert interruption.stopped == signal.SIGUSR1
    assert names(tmp_path) == ["step=4.ckpt"]


def test_nothing_keeps_a_run_alive_when_it_is_over(fit: Fit) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer = weakref.ref(fit([Interruption()], max_steps=2))
    gc.collect()

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert trainer() is None, "a sweep runs its jobs in one process, whose memory would grow with each job"


def test_what_a_killed_process_left_is_removed(fit: Fit, tmp_path: Path) -> None:
    for name in (".step=9.ckpt.123.tmp", "step=70.ckpt", "mine.ckpt"):
        (tmp_path / name).write_bytes(b"half")

    fit([Checkpoints(tmp_path, every=2)], max_steps=2)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.ckpt", "step=2.ckpt"]


def test_the_best_evaluation_has_its_checkpoint(fit: Fit, tmp_path: Path) -> None:
    values = {10: 0.5, 20: 0.8, 30: 0.7, 40: float("nan")}

    class Evaluate(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
            if trainer.global_step in values:
                module.holdout = {"val/click/auc": values[trainer.global_step]}
                checkpoints.on_validation_end(trainer, module)

    checkpoints = Checkpoints(tmp_path, every=15, best_by="test/click/auc")
    fit([Evaluate(), checkpoints])

    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert record == {"metric": "val/click/auc", "step": 20, "value": 0.8}
    assert names(tmp_path / "best") == ["step=20.ckpt"]
    resumed = Checkpoints(tmp_path, every=15, best_by="test/click/auc")
    resumed.continue_from(15)
    assert resumed.best is None, "step 20 will come again"
    resumed.continue_from(30)
    assert (resumed.best and resumed.best.step) == 20


def test_a_checkpoint_that_cannot_be_written_leaves_what_is_there(
    tmp_path: Path, disk_full_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    io, path = DurableCheckpointIO(), tmp_path / "step=10.ckpt"
    io.save_checkpoint({"global_step": 10}, path)
    before = path.read_bytes()

    with disk_full_after(2000), pytest.raises(UserError, match=r"step=10.ckpt cannot be written: File too large"):
        io.save_checkpoint({"global_step": 11, "weights": torch.zeros(100_000)}, path)

    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["step=10.ckpt"]
