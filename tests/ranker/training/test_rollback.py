"""What a rollback restores, what it leaves out and what it changes, on a real fit with verdicts at chosen steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from optim import build_optimizer
from ranker.errors import UserError
from ranker.stability import DivergenceDetector
from ranker.training.fit import Fit
from ranker.training.progress import planned_steps
from ranker.training.resumption import Resumption
from ranker.training.rollback import Rollback
from ranker.training.snapshots import SnapshotRing, thinned
from ranker.training.stability_callback import Stability
from scripted_verdicts import Verdicts

LR, WARMUP = 0.1, 30  # of the fixture fit


class Notes(Callback):
    """By step: the learning rate of the next step, the weights, the accumulators, the method, the batch."""

    def __init__(self) -> None:
        self.lr: dict[int, float] = {}
        self.batches: dict[int, int] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.method: dict[int, str] = {}
        self.planned: dict[int, int] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step, optimizer = trainer.global_step, trainer.optimizers[0]
        self.lr[step] = float(optimizer.param_groups[-1]["lr"])
        self.method[step] = optimizer.param_groups[-1]["method"]
        self.batches[step] = batch.number
        self.planned[step] = planned_steps(Fit(trainer))
        named = dict(pl_module.net.named_parameters())
        self.weights[step] = {name: p.detach().clone() for name, p in named.items()}
        self.sums[step] = {
            name: optimizer.state[p]["sum"].clone() for name, p in named.items() if "sum" in optimizer.state[p]
        }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def run(
    fit, verdicts: Verdicts, *, say: list[str] | None = None, trainer: dict[str, Any] | None = None, **options: Any
) -> tuple[Notes, Rollback, Any]:
    notes, rollback = Notes(), Rollback(tries=3, **options)
    ring, told = SnapshotRing(every=4, keep=6), [] if say is None else say
    stability = Stability(
        divergence=verdicts, snapshots=ring, rollback=rollback, say=lambda line, **_: told.append(line)
    )
    fitted = fit([notes], stability=stability, **(trainer or {}))
    return notes, rollback, fitted


def other(name: str, **options: Any):
    return lambda model_or_params, lr: build_optimizer(name, model_or_params, lr=lr, **options)


def test_a_checkpoint_of_the_other_optimizer_can_be_resumed_and_no_third_one_can_take_it(fit, tmp_path) -> None:
    optim = other("gc", clip_norm=1e-3)
    _, rollback, trainer = run(fit, Verdicts({22: 18}), back_steps=2, optim=optim)
    trainer.save_checkpoint(tmp_path / "step=60.ckpt")
    _, _, untrained = run(fit, Verdicts(), trainer={"max_steps": 1})
    module = Fit(untrained).module  # of Clippy, as a process that resumes builds it

    found = Resumption.of(tmp_path / "step=60.ckpt", module, other=rollback.optim)

    assert (found.step, found.position) == (trainer.global_step, 48)
    for third in (None, other("agc")):
        with pytest.raises(UserError, match="optim: method cannot change in a resumed run"):
            Resumption.of(tmp_path / "step=60.ckpt", module, other=third)


def test_a_late_verdict_goes_back_to_before_the_first_step_and_leaves_out_the_event_alone(fit) -> None:
    notes, rollback, trainer = run(fit, Verdicts({44: 18}), back_steps=2, skip_batches=6)

    (record,) = rollback.done
    assert (record["event_step"], record["step"], record["to_step"]) == (18, 44, 16)
    assert record["skipped_batches"] == [16, 22]  # the event is batch 17; from 2 before the first one on at least
    assert same(notes.weights[44], notes.weights[16])
    assert notes.batches[45] == 22
    assert trainer.global_step == 44 + 48 - 22


def test_the_accumulators_alone_come_back(fit) -> None:
    undisturbed, _, _ = run(fit, Verdicts())
    notes, rollback, trainer = run(fit, Verdicts({30: 18}), back_steps=2, restore="accumulators")

    (record,) = rollback.done
    assert (record["restored"], record["snapshot_step"], record["to_step"]) == ("accumulators", 16, 30)
    assert same(notes.sums[30], notes.sums[16])
    assert not same(notes.sums[30], undisturbed.sums[30])
    assert same(notes.weights[30], undisturbed.weights[30])
    assert not same(notes.weights[31], undisturbed.weights[31])
    assert notes.batches == undisturbed.batches
    assert record["skipped_rows"] == 0
    assert trainer.global_step == 48


@pytest.mark.parametrize("restore", ["all", "nothing"])
def test_another_optimizer_takes_over_with_the_accumulators_and_the_schedule(fit, restore: str) -> None:
    optim = other("gc", clip_norm=1e-3, clip_accumulator=True)
    notes, _, _ = run(fit, Verdicts({22: 18}), back_steps=2, skip_batches=0, restore=restore, optim=optim)

    back = 16 if restore == "all" else 22
    assert (notes.method[21], notes.method[22], notes.method[48]) == ("clippy", "gc", "gc")
    assert same(notes.weights[22], notes.weights[back])
    assert same(notes.sums[22], notes.sums[back])
    assert notes.lr[22] == pytest.approx(LR * (back + 1) / WARMUP)
    assert notes.lr[23] == pytest.approx(LR * (back + 2) / WARMUP)


def test_an_optimizer_that_keeps_other_quantities_starts_them_anew(fit) -> None:
    notes, _, trainer = run(fit, Verdicts({22: 18}), restore="nothing", optim=other("clippy_adam"))

    assert notes.method[48] == "clippy_adam"
    assert notes.sums[48] == {}
    states = trainer.optimizers[0].state.values()
    assert {int(state["step"]) for state in states} == {48 - 22}


def test_a_second_rollback_behind_the_first_has_the_other_optimizer_too(fit) -> None:
    optim = other("gc", clip_norm=1e-3)
    notes, rollback, _ = run(fit, Verdicts({22: 18, 25: 24}), back_steps=2, skip_batches=2, optim=optim, lr_factor=0.5)

    first, second = rollback.done
    assert first["to_step"] == second["to_step"] == 16
    assert (notes.method[22], notes.method[25], notes.method[26]) == ("gc", "gc", "gc")
    assert same(notes.weights[25], notes.weights[16])
    assert same(notes.sums[25], notes.sums[16])
    assert notes.lr[22] == pytest.approx(0.5 * LR * 17 / WARMUP)
    assert notes.lr[25] == pytest.approx(0.25 * LR * 17 / WARMUP)


def test_the_same_stretch_lost_again_leaves_out_twice_as_many(fit) -> None:
    _, rollback, _ = run(fit, Verdicts({18: 15, 20: 19, 36: 35}), back_steps=2, skip_batches=4)

    first, second, third = rollback.done
    assert first["skipped_batches"] == [12, 16]
    assert second["skipped_batches"] == [8, 14 + 8]  # the second event is of batch 16: 8 from 2 before it on
    assert third["to_step"] > second["step"], "healthy for long enough to take a snapshot"
    assert third["skipped_batches"][1] - third["skipped_batches"][0] == 4


class Learned(Verdicts):
    """Verdicts on a model that has learned already."""

    def start(self, fit: Fit, state: Any) -> DivergenceDetector:
        detector = super().start(fit, state)
        detector._classifier._auc.learned = True
        return detector


@pytest.mark.parametrize(
    ("verdicts", "options", "made"),
    [
        pytest.param(Verdicts({4: 2, 10: 8}), {}, 1, id="lost from the start twice"),
        pytest.param(Verdicts({18: 15, 23: 21}), {}, 1, id="as far as before on other batches"),
        pytest.param(Verdicts({18: 15, 22: 20}), {}, 2, id="less far: the rows may be at fault"),
        pytest.param(Learned({18: 15, 23: 21}), {}, 2, id="a model that had learned"),
        pytest.param(Verdicts({18: 15, 23: 21}), {"lr_factor": 0.5}, 2, id="at a lower rate"),
        pytest.param(Learned({18: 15, 23: 21}), {"skip_batches": 0}, 1, id="the same batches again"),
        pytest.param(Verdicts({18: 15, 23: 21}), {"restore": "nothing"}, 2, id="nothing restored"),
    ],
)
def test_a_rollback_that_changes_nothing_is_given_up(
    fit, verdicts: Verdicts, options: dict[str, Any], made: int
) -> None:
    said: list[str] = []
    _, rollback, _ = run(fit, verdicts, say=said, **{"back_steps": 2, "skip_batches": 4} | options)

    assert len(rollback.done) == made
    refused = [line for line in said if line.startswith("no rollback")]
    assert len(refused) == 2 - made
    assert all("lost again after the rollback to step" in line for line in refused)


def test_the_planned_steps_are_those_the_run_takes(fit) -> None:
    notes, _, trainer = run(fit, Verdicts({30: 18}), back_steps=2, skip_batches=6)
    assert (notes.planned[1], notes.planned[30]) == (48, 30 + 48 - 22)
    assert {notes.planned[step] for step in range(30, trainer.global_step + 1)} == {trainer.global_step}

    notes, _, trainer = run(fit, Verdicts(), trainer={"accumulate_grad_batches": 3})
    assert (notes.planned[1], trainer.global_step) == (16, 16)
    notes, _, _ = run(fit, Verdicts(), trainer={"max_steps": 7})
    assert notes.planned[1] == 7


def test_a_lower_rate_rises_back_over_the_given_steps(fit) -> None:
    notes, _, _ = run(fit, Verdicts({34: 33}), back_steps=1, restore="nothing", lr_factor=0.2, lr_steps=8)

    expected = [LR * (0.2 + 0.8 * min(k / 8, 1.0)) for k in range(14)]
    assert [notes.lr[34 + k] for k in range(14)] == pytest.approx(expected)
    assert notes.lr[33] == pytest.approx(LR)


def test_a_snapshot_from_within_the_ramp_gives_the_ramp_of_the_last_rollback(fit) -> None:
    notes, rollback, _ = run(fit, Verdicts({32: 30, 42: 41}), back_steps=1, skip_batches=1, lr_factor=0.2, lr_steps=16)

    assert rollback.done[1]["to_step"] == 40, "a snapshot of a step of the first ramp"
    shape = 1.0  # the first rollback went back to step 28, and twelve steps later warm-up was over
    assert notes.lr[41] == pytest.approx(LR * (0.2 + 0.8 * 9 / 16))
    assert notes.lr[42] == pytest.approx(LR * shape * 0.2)
    assert notes.lr[43] == pytest.approx(LR * (0.2 + 0.8 * 1 / 16))


@pytest.mark.parametrize(
    ("option", "value"), [("restore", "weights"), ("lr_steps", -1), ("lr_factor", 0.0), ("skip_batches", -1)]
)
def test_an_option_out_of_range_is_refused(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"callbacks.rollback.{option}"):
        Rollback(**{option: value})


@pytest.mark.parametrize("keep", [4, 6, 8])
def test_the_ring_always_has_a_snapshot_that_is_old_enough(keep: int) -> None:
    every, kept = 50, [0]
    oldest = every * 2 ** (keep - 2)
    for now in range(every, 400 * every, every):
        kept = [*thinned(kept, now, every=every, keep=keep), now]
        ages = [now - step for step in kept]
        assert len(kept) <= keep
        assert kept == sorted(set(kept))
        if keep >= 4 and now >= 3 * every:
            assert ages[-1] == 0
            assert ages[-2] == every, "the newest are kept as they were taken"
        for wanted in (every, 2 * every, oldest):
            if wanted <= now:
                assert any(wanted <= age <= 4 * wanted for age in ages), (now, ages, wanted)
