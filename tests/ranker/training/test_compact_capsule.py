"""Capsules of large tables: the used rows alone, and a replay with the bits of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from optim import build_optimizer
from ranker.capsules.capsule import Capsule
from ranker.models import SharedBottom
from ranker.models.admission import admission_of
from ranker.replay.engine import Engine, Settings
from ranker.runs.run_folder import RunFolder
from ranker.training.capsule_writer import CapsuleWriter
from ranker.training.module import RankingModule
from ranker.training.rollback import Rollback
from ranker.training.snapshots import SnapshotRing
from ranker.training.stability_callback import Stability
from scripted_verdicts import Verdicts
from support import assert_equal

Run = Callable[..., pl.Trainer]
IDS = {"admit_after": 3, "evict_after_days": 0.3}
WEIGHT = "embeddings.tables.dim_4.weight"


def capsule_of(fit: Run, folder: Path, rows_above: float, *, tries: int = 0, **options: Any) -> Capsule:
    """Of an event at step 30 that is judged at step 34; the capsule begins at step 24."""
    writer = CapsuleWriter(steps_before=5, steps_after=4, folder=RunFolder(folder), cfg=OmegaConf.create({"seed": 0}))
    stability = Stability(
        divergence=Verdicts({34: 30}),
        snapshots=SnapshotRing(every=4, keep=4, rows_above=rows_above),
        capsules=writer,
        rollback=Rollback(tries=tries, back_steps=12, skip_batches=3),
    )
    fit(stability=stability, sparse=True, **options)
    return Capsule.load(folder / "capsules" / "step=30")


def replayed(capsule: Capsule) -> tuple[Engine, torch.Tensor]:
    """As ``scripts/replay.py``, with the model and the optimizer of the fixture."""
    module = RankingModule(
        SharedBottom(capsule.schema, hidden=[16, 16], sparse_embeddings=True),
        schema=capsule.schema,
        optimizer=lambda model_or_params, lr: build_optimizer("clippy", model_or_params, lr=lr),
        lr=0.1,
        warmup_steps=30,
    )
    if (admission := admission_of(module.net)) is not None:
        admission.stand_for(capsule.places)
    engine = Engine(module, Settings(detector={}))
    engine.restore(capsule.state)
    found = engine.run(capsule.manifest.steps, capsule.batches)
    return engine, found.losses_ST


@pytest.mark.parametrize("tries", [0, 1], ids=["", "rolled back"])
@pytest.mark.parametrize("ids", [None, IDS], ids=["plain", "admission"])
def test_a_replay_has_the_losses_of_the_run_and_the_rows_of_a_whole_capsule(
    fit: Run, tmp_path: Path, ids: dict[str, float] | None, tries: int
) -> None:
    rows = capsule_of(fit, tmp_path / "rows", 1e-6, tries=tries, ids=ids)
    whole = capsule_of(fit, tmp_path / "whole", 0.0, tries=tries, ids=ids)

    assert rows.manifest == whole.manifest
    assert not whole.rows
    assert rows.state.net[WEIGHT].shape[0] < whole.state.net[WEIGHT].shape[0]
    places = rows.places[4]
    for name in (WEIGHT, *(f"embeddings.admission.{part}_4" for part in ("seen", "last") if ids)):
        assert_equal(whole.state.net[name][places], rows.state.net[name])
    for batch, other in zip(rows.batches, whole.batches, strict=True):
        for feature, column in zip(rows.schema.one_hot, batch[0].onehot_BC.T, strict=True):
            known = rows.rows[rows.schema.table_of(feature).name].rows
            number = rows.schema.one_hot.index(feature)
            assert torch.equal(known[column], other[0].onehot_BC[:, number])
    (few, few_ST), (every, every_ST) = replayed(rows), replayed(whole)
    assert torch.equal(every_ST, whole.manifest.signals_SN()[:, : every_ST.shape[1]])  # what a replay promises
    assert torch.equal(few_ST, every_ST)
    after, expected = few.module.net.state_dict(), every.module.net.state_dict()
    assert_equal(expected[WEIGHT][places], after[WEIGHT])
    if ids:
        counts = [admission_of(engine.module.net).totals for engine in (few, every)]
        assert torch.equal(*counts)
        evicted = rows.state.net["embeddings.admission.totals"][:, 2].sum()
        assert counts[0][:, 2].sum() > evicted, "rows were reset in the replay"
