"""What training has seen of ids goes back, and is saved, with the weights that depend on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ranker.capsules.training_state import Trained
from ranker.models.admission import admission_of
from ranker.runs.checkpoint_files import by_step
from ranker.training.checkpoints import Checkpoints
from ranker.training.fit import Fit
from ranker.training.table_checkpoints import DurableCheckpointIO, read_checkpoint
from support import assert_equal

Run = Callable[..., pl.Trainer]
IDS = {"admit_after": 4, "evict_after_days": 0.3}


class Again(Callback):
    """Goes back from one step to another, with everything, and trains on the batches between them once more."""

    def __init__(self, to: int, at: int) -> None:
        self._to, self._at, self._state, self._data = to, at, None, {}
        self.evicted = [0.0, 0.0]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step not in (self._to, self._at, self._at + 1):
            return
        fit = Fit(trainer)
        if trainer.global_step == self._at:
            fit.data.go_back(self._data)  # the trainer holds one batch already, and trains on it
            return
        schedule = trainer.lr_scheduler_configs[0].scheduler
        live = Trained(
            net=fit.module.net,
            optimizer=trainer.optimizers[0],
            schedule=schedule,
            train_auc=fit.module.train_auc,
            detector=None,
        )
        seen = sum(v for name, v in admission_of(fit.module.net).values().items() if name.endswith("evicted"))
        if self._state is None:
            self._state, self._data, self.evicted[0] = live.capture(trainer.global_step), fit.data.state_dict(), seen
        else:
            self.evicted[1] = seen
            live.restore(self._state)
            fit.data.load_state_dict(self._data)


def test_a_rollback_takes_back_what_was_seen(fit: Run) -> None:
    again = Again(to=20, at=30)
    whole, twice = fit(ids=IDS), fit([again], ids=IDS)
    assert 0 < again.evicted[0] < again.evicted[1], "rows were reset before and between"
    assert twice.global_step == whole.global_step + 11
    assert_equal(dict(whole.lightning_module.net.state_dict()), dict(twice.lightning_module.net.state_dict()))


@pytest.mark.parametrize("sparse", [True, False])
def test_a_checkpoint_of_touched_rows_holds_the_rows_that_were_reset(fit: Run, tmp_path: Path, sparse: bool) -> None:
    rows = DurableCheckpointIO(rows_above=1e-6, full_share=0.9)
    fit([Checkpoints(tmp_path / "rows", every=9)], ids=IDS, sparse=sparse, plugins=[rows])
    fit([Checkpoints(tmp_path / "whole", every=9)], ids=IDS, sparse=sparse, plugins=[DurableCheckpointIO()])
    assert len(by_step(tmp_path / "rows")) > 0
    for path in by_step(tmp_path / "rows"):
        found, expected = read_checkpoint(path), read_checkpoint(tmp_path / "whole" / path.name)
        for key in ("state_dict", "optimizer_states"):
            assert_equal(expected[key], found[key], f"{path.name} {key}")
