"""A replay counts, admits and resets the rows of tables as the run did."""

from __future__ import annotations

from dataclasses import replace

import torch

from ranker.models import SharedBottom
from ranker.models.admission import admission_of, observe
from ranker.replay.engine import Change, Engine, Settings
from ranker.training.training_step import forward_loss
from support import assert_equal

from .conftest import SCHEMA, Toy, make_batch

DAY_MS = 86_400_000
RULED = replace(SCHEMA, categorical=tuple(replace(f, admit_after=9, evict_after_days=2) for f in SCHEMA.categorical))


class Ruled(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.schema, self.net = RULED, SharedBottom(RULED, hidden=[16, 16])
        self.net.load_state_dict(Toy().net.state_dict(), strict=False)


def batches(steps: int = 20):
    """Three batches a day; a window is a day, because rows are evicted only where a new window begins."""
    made = [make_batch(number, rows=6) for number in range(steps)]
    first = 19_700 * DAY_MS
    return [replace(b, time_ms_B=b.time_ms_B + first + b.number * DAY_MS // 3, window=b.number // 3) for b in made]


def trained(found) -> Ruled:
    """As ``RankingModule.training_step`` and Lightning do."""
    module = Ruled()
    optimizer = module.configure_optimizers()
    for batch in found:
        observe(module.net, optimizer, [batch])
        forward_loss(module, batch)[1].total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


def test_a_replay_has_the_counts_and_the_bits_of_the_run() -> None:
    found, module = batches(), trained(batches())
    engine = Engine(Ruled(), Settings(detector={}))
    engine.run(range(1, 11), [[batch] for batch in found[:10]])
    state = engine.state()
    for _ in range(2):
        engine.restore(state)
        engine.run(range(11, 21), [[batch] for batch in found[10:]])
        assert_equal(dict(module.net.state_dict()), dict(engine.module.net.state_dict()))
    assert sum(value for name, value in admission_of(module.net).values().items() if name.endswith("evicted")) > 0


def test_shares_of_ranks_count_as_the_whole_and_a_gradient_counts_nothing() -> None:
    found = batches()
    whole, halves = (Engine(Ruled(), Settings(detector={})) for _ in range(2))
    whole.run(range(1, 21), [[batch] for batch in found])
    halves.run(range(1, 21), [[batch.slice(0, 2), batch.slice(2, 6)] for batch in found])
    counted = dict(admission_of(whole.module.net).state_dict())
    assert_equal(counted, dict(admission_of(halves.module.net).state_dict()))
    counted = {name: value.clone() for name, value in counted.items()}
    whole.task_gradients([found[-1]], ["bottom.layers.0.weight"])
    assert_equal(counted, dict(admission_of(whole.module.net).state_dict()))


def test_a_batch_that_is_left_out_is_not_counted() -> None:
    found = batches()
    engine = Engine(Ruled(), Settings(detector={}))
    engine.run(range(1, 21), [[batch] for batch in found], changes=[Change(at=frozenset([3]), leave_out=True)])
    module = trained(found[:3] + found[4:])
    assert torch.equal(
        admission_of(module.net).state_dict()["seen_4"], admission_of(engine.module.net).state_dict()["seen_4"]
    )
