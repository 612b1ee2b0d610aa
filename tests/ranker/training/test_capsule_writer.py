"""The recent past is bounded, and what is held on to goes last."""

from __future__ import annotations

import torch

from ranker.capsules.capsule import num_bytes
from ranker.data.batch import Batch
from ranker.training.capsule_writer import Recorder

BATCH = Batch(
    dense_BF=torch.zeros(8, 3),
    onehot_BC=torch.zeros(8, 1, dtype=torch.int64),
    ragged={},
    labels_BT=torch.zeros(8, 2),
    mask_BT=torch.ones(8, 2, dtype=torch.bool),
    time_ms_B=torch.arange(8),
    row_B=torch.arange(8),
    window=0,
    number=0,
)
SIGNALS = torch.zeros(7)
SIZE = num_bytes(BATCH)


def recorder(batches: float) -> Recorder:
    return Recorder(int(batches * SIZE))


def fill(made: Recorder, steps: range) -> None:
    for step in steps:
        made.add(step, BATCH, SIGNALS)


def steps(made: Recorder) -> list[int]:
    return [entry.step for entry in made.between(0, 1000)]


def test_over_the_bound_the_oldest_goes_first_and_what_is_held_last() -> None:
    made = recorder(5)
    fill(made, range(1, 8))
    assert steps(made) == [3, 4, 5, 6, 7]
    made.hold([(3, 5)])
    fill(made, range(8, 11))
    assert steps(made) == [4, 5, 8, 9, 10]
    made.hold([])
    fill(made, range(11, 13))
    assert steps(made) == [8, 9, 10, 11, 12]


def test_a_stretch_longer_than_the_bound_loses_its_beginning() -> None:
    made = recorder(3)
    made.hold([(0, 100)])
    fill(made, range(1, 6))
    assert steps(made) == [3, 4, 5]
    assert made.covers_after(5) == 2


def test_coverage_ends_at_the_first_gap() -> None:
    made = recorder(10)
    fill(made, range(1, 4))
    fill(made, range(6, 9))
    assert [made.covers_after(until) for until in (3, 7, 8, 9)] == [0, 5, 5, 9]  # step 9 itself is not there


def test_forgetting_spares_what_is_held_and_clearing_does_not() -> None:
    made = recorder(10)
    fill(made, range(1, 9))
    made.hold([(1, 3)])
    made.forget(6)
    assert steps(made) == [2, 3, 7, 8]
    made.clear()
    assert steps(made) == []
    fill(made, range(1, 3))
    assert steps(made) == [1, 2]
