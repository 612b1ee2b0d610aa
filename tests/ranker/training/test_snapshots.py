"""Snapshots: whatever happens after one is taken, going back to it gives the same steps again."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import Callback

from ranker.capsules.training_state import TrainingState
from ranker.errors import UserError
from ranker.runs.run_folder import RunFolder
from ranker.training import snapshots
from ranker.training.fit import Fit
from ranker.training.snapshots import SnapshotRing, capture, restore
from ranker.training.stability_callback import DivergenceWatch, Stability


def detector_of(trainer):
    return next(c for c in trainer.callbacks if isinstance(c, Stability)).detector


class GoBack(Callback):
    """Notes each step; takes a snapshot at a step, and goes back to it at another one."""

    def __init__(self, *, at: int, back_at: int, skip_batches: int = 0, path: Path | None = None) -> None:
        self.at, self.back_at, self.skip_batches, self.path = at, back_at, skip_batches, path
        self.notes: list[dict[str, object]] = []
        self.gone_back_to: int | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.notes.append(
            {
                "batch": batch.number,
                "rows": batch.row_B.tolist(),
                "dense": batch.dense_BF.double().sum().item(),
                "losses": pl_module.signals.losses_T.tolist(),
                "auc": pl_module.signals.auc_T.nan_to_num(-1.0).tolist(),
                "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
                "draws": [torch.rand(()).item(), np.random.rand(), random.random()],
                "position": trainer.datamodule.position,
            }
        )
        if trainer.global_step == self.at:
            self.snapshot = capture(Fit(trainer), detector_of(trainer))
        if trainer.global_step == self.back_at and self.gone_back_to is None:
            if self.path is not None:
                self.snapshot.save(self.path)
                self.snapshot = TrainingState.load(self.path)
            restore(self.snapshot, Fit(trainer), detector_of(trainer), skip_batches=self.skip_batches)
            self.gone_back_to = len(self.notes)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_going_back_gives_the_same_steps_bit_by_bit(fit, tmp_path, num_workers):
    probe = GoBack(at=11, back_at=27, path=tmp_path / "s.pt")  # in the middle of windows of 8 batches

    trainer = fit([probe], num_workers=num_workers)

    first, again = probe.notes[11:27], probe.notes[27 : 27 + 16]
    assert first == again
    assert [n["batch"] for n in probe.notes[27:]] == list(range(11, 48))
    assert trainer.global_step == 48 + 16, "steps are counted, not undone"


def test_a_snapshot_can_be_used_twice(fit):
    class Twice(GoBack):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if trainer.global_step == 30:
                restore(self.snapshot, Fit(trainer), detector_of(trainer))

    probe = Twice(at=10, back_at=20)
    fit([probe])

    assert probe.notes[10:20] == probe.notes[20:30] == probe.notes[30:40]


def test_going_back_may_leave_out_batches(fit):
    probe = GoBack(at=11, back_at=16, skip_batches=20)

    fit([probe])

    assert [n["batch"] for n in probe.notes[16:]] == list(range(31, 48))


def test_going_back_works_after_the_last_batch_was_fetched(fit):
    probe = GoBack(at=40, back_at=48)

    fit([probe])

    assert probe.notes[40:48] == probe.notes[48:56]
    assert len(probe.notes) == 56


def test_leaving_out_all_that_is_left_ends_the_run(fit):
    probe = GoBack(at=40, back_at=45, skip_batches=500)

    fit([probe])

    assert len(probe.notes) == 45


def test_a_damaged_file_or_another_one_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 cut off")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "b.pt")

    with pytest.raises(UserError, match="cannot be read"):
        TrainingState.load(tmp_path / "a.pt")
    with pytest.raises(UserError, match="no snapshot"):
        TrainingState.load(tmp_path / "b.pt")


def test_the_ring_keeps_the_newest_and_is_bounded(fit):
    ring = SnapshotRing(every=5, keep=3)

    fit(stability=Stability(divergence=DivergenceWatch(), snapshots=ring))

    assert [s.step for s in ring.snapshots] == [35, 40, 45]


def test_the_oldest_makes_room_before_the_next_is_taken(fit, monkeypatch):
    ring, held = SnapshotRing(every=5, keep=3), []

    def counted(*given):
        held.append(len(ring.snapshots))
        return capture(*given)

    monkeypatch.setattr(snapshots, "capture", counted)
    fit(stability=Stability(divergence=DivergenceWatch(), snapshots=ring))

    assert held[:4] == [0, 1, 2, 2]
    assert max(held) == 2


def test_numbers_out_of_range_are_refused():
    with pytest.raises(UserError, match="disk"):
        SnapshotRing(keep=2, disk=3)


def test_snapshots_that_cannot_fit_are_refused_before_the_first_step(fit):
    many = 10**9  # of a tiny model, more than any machine has
    with pytest.raises(UserError, match=rf"{many} snapshots of .* do not fit"):
        fit(stability=Stability(divergence=DivergenceWatch(), snapshots=SnapshotRing(keep=many)))
    fit(stability=Stability(divergence=DivergenceWatch(), snapshots=SnapshotRing(every=0, keep=many)), max_steps=1)


def test_a_full_disk_ends_the_snapshots_on_it_and_not_the_run(fit, tmp_path, monkeypatch, caplog):
    save = torch.save

    def full_after_some_bytes(fields, path):
        save(fields, path)
        raise OSError(errno.ENOSPC, "No space left on device")

    ring = SnapshotRing(every=10, keep=3, disk=3, folder=RunFolder(tmp_path))
    monkeypatch.setattr(torch, "save", full_after_some_bytes)

    trainer = fit(stability=Stability(divergence=DivergenceWatch(), snapshots=ring))

    assert trainer.global_step == 48
    assert [s.step for s in ring.snapshots][-1] == 40, "those in memory go on"
    assert [p for p in (tmp_path / "snapshots").rglob("*") if p.is_file()] == []
    (said,) = [record.getMessage() for record in caplog.records if "no more snapshots" in record.getMessage()]
    assert "No space left on device" in said
