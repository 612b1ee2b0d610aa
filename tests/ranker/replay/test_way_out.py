"""A replay does what a rollback would have done at the first suspicion, and shows what follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ranker.replay.way_out import is_asked, replay_way_out

from .conftest import make_batch, planted

EVENT, FIRST, STEPS = 66, 52, 80  # step of the planted batch; first and last step of the capsule
BATCHES = [[planted(make_batch(i), list(range(20)), 0) if i == EVENT - 1 else make_batch(i)] for i in range(STEPS)]


@pytest.fixture
def lost(engine):
    """A healthy engine 15 steps before a batch that harms it, and its capsule's steps and batches."""
    made = engine("adagrad")
    made.run(range(1, FIRST), BATCHES[: FIRST - 1])
    return made, list(range(FIRST, STEPS + 1)), BATCHES[FIRST - 1 :]


def config(**rollback: Any):
    return OmegaConf.create({"optim": {"name": "adagrad"}, "callbacks": {"rollback": rollback}})


def test_with_all_restored_the_event_is_left_out_and_nothing_moves(lost, engine) -> None:
    made, steps, batches = lost
    state = made.state()
    harmed = made.run(steps, batches)
    assert harmed.event is not None
    assert harmed.event.step == EVENT
    made.restore(state)

    saved = replay_way_out(made, config(restore="all"), steps, batches, make=lambda cfg: engine(), name="saved")

    assert saved.event is None
    assert EVENT not in saved.steps
    assert saved.steps[: EVENT - FIRST] == list(range(FIRST, EVENT))
    assert torch.equal(saved.losses_ST[: EVENT - FIRST], harmed.losses_ST[: EVENT - FIRST])
    assert saved.losses_ST[-5:].mean() < harmed.losses_ST[-5:].mean()


def test_the_batches_before_the_event_are_left_out_as_in_a_run(lost, engine) -> None:
    made, steps, batches = lost
    cfg = config(restore="all", back_steps=4)

    saved = replay_way_out(made, cfg, steps, batches, make=lambda cfg: engine(), name="saved")

    assert not set(range(EVENT - 4, EVENT + 1)) & set(saved.steps)
    assert set(range(FIRST, EVENT - 4)) <= set(saved.steps)


@pytest.mark.parametrize("restore", ["accumulators", "nothing"])
def test_without_going_back_the_harmed_weights_stay(lost, engine, restore: str) -> None:
    made, steps, batches = lost
    sums = {n: made.optimizer.state[p]["sum"].clone() for n, p in made.module.net.named_parameters()}
    seen: list[float] = []

    tried = replay_way_out(
        made,
        config(restore=restore, lr_factor=1e-9),  # so that nothing changes after it
        steps,
        batches,
        make=lambda cfg: engine(),
        name=restore,
        tick=lambda: seen.append(float(made.optimizer.param_groups[-1]["lr"])),
    )

    assert tried.steps == steps, "it goes on where it is"
    now = {n: made.optimizer.state[p]["sum"] for n, p in made.module.net.named_parameters()}
    name = "bottom.layers.0.weight"
    growth = float((now[name] / sums[name]).max())  # where the planted feature enters
    assert (growth > 1000) == (restore == "nothing"), growth
    assert seen[-1] == pytest.approx(1e-10)
    before, after = tried.losses_ST[: EVENT - FIRST, 1], tried.losses_ST[EVENT - FIRST + 8 :, 1]
    assert after.mean() > 1.2 * before.mean(), "the weights are as the event left them"


def test_another_optimizer_takes_over_and_the_rate_rises_back(lost, engine) -> None:
    made, steps, batches = lost
    built = []

    def make(cfg):
        built.append(engine(cfg.optim.name))
        return built[-1]

    rates: list[float] = []
    replay_way_out(
        made,
        config(restore="all", optim={"name": "clippy"}, lr_factor=0.5, lr_steps=4),
        steps,
        batches,
        make=make,
        name="clippy",
        tick=lambda: rates.append(float(built[-1].optimizer.param_groups[-1]["lr"])) if built else None,
    )

    (clippy,) = built
    assert clippy.optimizer.param_groups[-1]["method"] == "clippy"
    assert rates[:5] == pytest.approx([0.0625, 0.075, 0.0875, 0.1, 0.1])
    # It began with the accumulators of the snapshot and not with new ones: those of 51 steps are larger than one's.
    assert float(clippy.optimizer.state[clippy.module.net.bottom.layers[0].weight]["sum"].mean()) > 0.1


def test_without_a_divergence_there_is_nothing_to_act_on(engine) -> None:
    made = engine("adagrad")
    calm = [[make_batch(i)] for i in range(70)]
    made.run(range(1, 61), calm[:60])

    tried = replay_way_out(made, config(restore="all"), range(61, 71), calm[60:], make=lambda cfg: engine(), name="x")

    assert tried.event is None
    assert list(tried.steps) == list(range(61, 71))


def test_it_is_asked_for_by_name_or_by_a_mitigation_that_sets_it() -> None:
    saved = config(tries=0)
    assert is_asked(saved, saved, ["callbacks.rollback.restore=all"])
    assert is_asked(config(tries=3), saved, ["mitigation=rollback"])
    assert is_asked(config(tries=3), config(tries=3), ["mitigation=rollback"]), "that of the run, once more"
    assert not is_asked(saved, saved, ["optim=clippy"])
    assert not is_asked(saved, saved, ["mitigation=warmup"])
    assert not is_asked(OmegaConf.create({}), OmegaConf.create({}), ["optim=clippy"])
