"""What another optimizer takes over from a snapshot, and that a replay is exact and leaves its snapshot alone."""

from __future__ import annotations

import pytest
import torch

from ranker.replay.engine import Change
from ranker.replay.trajectory import first_difference
from ranker.replay.transfer_state import carry

from .conftest import make_batch

STEPS = range(11, 21)
BATCHES = [[make_batch(i)] for i in range(20)]


@pytest.fixture
def trained(engine):
    """An engine at step 10, and its state there."""
    made = engine("adagrad")
    made.run(range(1, 11), BATCHES[:10])
    return made, made.state()


def test_a_restored_state_gives_the_same_losses_again_and_again(trained) -> None:
    made, state = trained
    first = made.run(STEPS, BATCHES[10:])
    for _ in range(2):
        made.restore(state)
        assert first_difference(first.losses_ST, made.run(STEPS, BATCHES[10:]).losses_ST) is None
    made.restore(state)
    other = made.run(STEPS, BATCHES[10:], changes=[Change(at=frozenset([3]), leave_out=True)])
    assert len(other.steps) == 9
    assert first_difference(first.losses_ST[:9], other.losses_ST) == 3


def test_two_shares_of_a_batch_train_as_the_whole(trained) -> None:
    made, state = trained
    whole = made.run(STEPS, BATCHES[10:])
    made.restore(state)
    halves = made.run(STEPS, [[part.slice(0, 20), part.slice(20, 64)] for (part,) in BATCHES[10:]])
    torch.testing.assert_close(halves.losses_ST, whole.losses_ST, rtol=1e-4, atol=1e-5)


def test_accumulators_are_carried_where_the_new_optimizer_keeps_the_same(engine, trained) -> None:
    run, state = trained
    sums = {n: run.optimizer.state[p]["sum"].clone() for n, p in run.module.net.named_parameters()}
    clippy, adam = engine("clippy"), engine("clippy_adam")

    kept, reset = carry(state, run=run, other=clippy), carry(state, run=run, other=adam)

    tensors = len(sums)
    assert (kept.weights, kept.kept, kept.reset, kept.fresh) == (tensors, {"sum": tensors}, {}, [])
    assert all(torch.equal(clippy.optimizer.state[p]["sum"], sums[n]) for n, p in clippy.module.net.named_parameters())
    # Embeddings keep plain Adagrad under any rule; the rest has moments, which Adagrad has not.
    assert reset.kept == {"sum": 1}
    assert set(reset.reset) == {"step", "exp_avg", "exp_avg_sq"}
    assert "reset" in str(reset)
    weights = run.module.net.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in clippy.module.net.state_dict().items())


def test_a_model_of_another_shape_says_what_is_drawn_anew(engine, trained) -> None:
    run, state = trained

    wide = carry(state, run=run, other=engine("adagrad", hidden=(16, 8)))

    assert "bottom.layers.1.weight" in wide.fresh
    assert "bottom.layers.0.weight" not in wide.fresh
    assert "drawn anew" in str(wide)
