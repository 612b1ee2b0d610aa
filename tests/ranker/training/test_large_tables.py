"""Snapshots that keep touched rows of large tables: a rollback has the bits of one that copies whole tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from optim import build_optimizer
from ranker.config import WarmStartSettings
from ranker.runs.checkpoint_files import by_step
from ranker.training.boundaries import Boundaries
from ranker.training.checkpoints import Checkpoints
from ranker.training.fit import Fit
from ranker.training.rollback import Rollback
from ranker.training.snapshots import SnapshotRing
from ranker.training.stability_callback import Stability
from ranker.training.table_checkpoints import DurableCheckpointIO, read_checkpoint
from scripted_verdicts import Verdicts
from support import assert_equal

Run = Callable[..., pl.Trainer]
IDS = {"admit_after": 4, "evict_after_days": 0.3}
TABLE = "embeddings.tables.dim_4.weight"


class States(Callback):
    """The net and what the optimizer keeps by parameter, after each step, and the bytes that are kept to go back."""

    def __init__(self) -> None:
        self.seen: list[dict[str, dict[str, Tensor]]] = []
        self.kept: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        optimizer = trainer.optimizers[0]
        net = {name: value.clone() for name, value in module.net.state_dict().items()}
        state = {
            name: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
            for name, p in module.net.named_parameters()
            if p in optimizer.state
        }
        self.seen.append({"net": net} | state)
        large = Fit(trainer).module.large
        self.kept.append(0 if large is None else large.kept_bytes)


def other(name: str) -> Callable[..., torch.optim.Optimizer]:
    return lambda model_or_params, lr: build_optimizer(name, model_or_params, lr=lr)


def run(fit: Run, rows_above: float, verdicts: dict[int, int], more: tuple[Any, ...] = (), **options: Any) -> States:
    states, ring = States(), SnapshotRing(every=4, keep=4, rows_above=rows_above)
    rollback = Rollback(tries=3, back_steps=2, skip_batches=3, **options)
    stability = Stability(divergence=Verdicts(verdicts), snapshots=ring, rollback=rollback, say=lambda *_, **__: None)
    before = [make(stability) for make in more]
    fit([*before, states], stability=stability, sparse=True, ids=IDS)
    assert len(rollback.done) == len(verdicts)
    if rows_above:
        assert all(TABLE not in s.net and s.mark is not None for s in ring.snapshots)
    return states


@pytest.mark.parametrize(
    ("verdicts", "options"),
    [
        ({3: 2}, {}),  # to the start, where there are no accumulators yet
        ({22: 18, 38: 33, 44: 43}, {}),  # more than once, with snapshots dropped between
        ({30: 18}, {"restore": "accumulators"}),
        (
            {22: 18, 25: 24},
            {"optim": other("gc"), "lr_factor": 0.5},
        ),  # takes the accumulators over, and goes back behind the switch
        ({22: 18, 25: 24}, {"optim": other("clippy_adam"), "lr_factor": 0.5}),  # keeps others
        pytest.param(
            {22: 18, 34: 30}, {"optim": other("clippy_adam"), "restore": "accumulators"}, marks=pytest.mark.slow
        ),
    ],
    ids=["start", "often", "accumulators", "switched", "adam", "adam, accumulators"],
)
def test_a_rollback_has_the_bits_of_one_with_whole_tables(
    fit: Run, verdicts: dict[int, int], options: dict[str, Any]
) -> None:
    rows, whole = (run(fit, above, verdicts, **options) for above in (1e-6, 0.0))

    assert len(rows.seen) == len(whole.seen) >= 48
    for step, (found, expected) in enumerate(zip(rows.seen, whole.seen, strict=True), 1):
        assert_equal(expected, found, f"step {step}")
    assert set(whole.kept) == {0}
    assert max(rows.kept) > 0


@pytest.mark.parametrize("how", [pytest.param("reset", marks=pytest.mark.slow), "decay"])
def test_a_rollback_over_a_boundary_has_the_accumulators_of_before_it(fit: Run, how: str) -> None:
    settings = WarmStartSettings(accumulators=how, half_life_rows=500, at_windows=True)  # windows of 8 steps
    more = (lambda stability: Boundaries(settings, stability),)

    rows, whole = (run(fit, above, {22: 15}, more) for above in (1e-6, 0.0))

    for step, (found, expected) in enumerate(zip(rows.seen, whole.seen, strict=True), 1):
        assert_equal(expected, found, f"step {step}")


@pytest.mark.parametrize("how", [pytest.param("reset", marks=pytest.mark.slow), "decay"])
def test_checkpoints_of_touched_rows_follow_a_boundary(fit: Run, tmp_path: Any, how: str) -> None:
    settings = WarmStartSettings(accumulators=how, half_life_rows=500, at_windows=True)
    for name, plugin in (("rows", DurableCheckpointIO(rows_above=1e-6)), ("whole", DurableCheckpointIO())):
        stability = Stability(divergence=Verdicts())
        callbacks = [Boundaries(settings, stability), Checkpoints(tmp_path / name, every=11)]
        fit(callbacks, stability=stability, sparse=True, plugins=[plugin])

    for path in by_step(tmp_path / "whole"):
        found, expected = (read_checkpoint(tmp_path / name / path.name) for name in ("rows", "whole"))
        assert_equal(expected["optimizer_states"], found["optimizer_states"], path.name)


@pytest.mark.parametrize("how", ["reset", pytest.param("decay", marks=pytest.mark.slow)])
def test_checkpoints_of_a_run_that_resumes_at_a_boundary_have_the_changed_accumulators(
    fit: Run, tmp_path: Any, how: str
) -> None:
    settings = WarmStartSettings(accumulators=how, half_life_rows=500, at_windows=True)
    for name, above in (("rows", 1e-6), ("whole", 0.0)):
        for every, limit in ((8, 16), (4, 20)):  # the second attempt begins with the first batch of a window
            stability = Stability(divergence=Verdicts())
            checkpoints = Checkpoints(tmp_path / name, every=every)
            checkpoints.continue_from(limit - every if every == 4 else 0)
            known = by_step(tmp_path / name)[-1:]
            fit(
                [Boundaries(settings, stability), checkpoints],
                stability=stability,
                sparse=True,
                plugins=[DurableCheckpointIO(rows_above=above, full_share=0.99)],
                max_steps=limit,
                ckpt_path=str(known[0]) if known else None,
            )

    found, expected = (read_checkpoint(tmp_path / name / "step=20.ckpt") for name in ("rows", "whole"))
    assert_equal(expected["optimizer_states"], found["optimizer_states"])


def test_checkpoints_of_touched_rows_follow_accumulators_that_went_back(fit: Run, tmp_path: Any) -> None:
    for name, above in (("rows", 1e-6), ("whole", 0.0)):
        rollback = Rollback(tries=1, back_steps=2, restore="accumulators")
        stability = Stability(
            divergence=Verdicts({22: 18}),  # back to step 16, before the first checkpoint
            snapshots=SnapshotRing(every=4, keep=4, rows_above=1e-6),
            rollback=rollback,
            say=lambda *_, **__: None,
        )
        plugins = [DurableCheckpointIO(rows_above=above, full_share=0.99)]
        fit([Checkpoints(tmp_path / name, every=20)], stability=stability, sparse=True, plugins=plugins, max_steps=24)
        assert len(rollback.done) == 1

    found, expected = (read_checkpoint(tmp_path / name / "step=24.ckpt") for name in ("rows", "whole"))
    assert_equal(expected["optimizer_states"], found["optimizer_states"])


def test_whole_tables_are_copied_below_the_limit_with_dense_gradients_and_for_files(fit: Run, tmp_path: Any) -> None:
    for sparse, options in (
        (True, {"rows_above": 1.0}),
        (False, {"rows_above": 1e-6}),
        (True, {"rows_above": 1e-6, "disk": 1}),
    ):
        ring = SnapshotRing(every=20, keep=2, **options)
        trainer = fit(stability=Stability(divergence=Verdicts(), snapshots=ring), sparse=sparse)
        assert Fit(trainer).module.large is None
        assert all(TABLE in s.net for s in ring.snapshots)
