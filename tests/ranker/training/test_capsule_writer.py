"""The recent past is bounded, what is held on to goes last, and every full divergence leaves a capsule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ranker.capsules.capsule import Capsule, num_bytes
from ranker.data.batch import Batch
from ranker.runs.run_folder import RunFolder
from ranker.training import capsule_writer
from ranker.training.capsule_recorder import Recorder
from ranker.training.capsule_writer import CapsuleWriter
from ranker.training.snapshots import SnapshotRing
from ranker.training.stability_callback import Stability
from scripted_verdicts import Verdicts

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


# What a run leaves: the verdicts are the test's, all else is real. 48 steps, a snapshot every 4.


def capsules(fit, folder: Path, verdicts: Verdicts, **options: Any) -> dict[str, Capsule]:
    writer = CapsuleWriter(
        steps_before=2, steps_after=4, folder=RunFolder(folder), cfg=OmegaConf.create({"seed": 0}), **options
    )
    stability = Stability(divergence=verdicts, snapshots=SnapshotRing(every=4, keep=6), capsules=writer)
    fit(stability=stability)
    return {path.name: Capsule.load(path) for path in sorted((folder / "capsules").glob("step=*"))}


def span(capsule: Capsule) -> tuple[int, int, int]:
    """The steps of the snapshot, of the first batch and of the last; there is no gap."""
    steps = list(capsule.manifest.steps)
    assert steps == list(range(steps[0], steps[-1] + 1))
    assert capsule.state.step == capsule.manifest.snapshot_step
    return capsule.manifest.snapshot_step, steps[0], steps[-1]


@pytest.mark.parametrize(
    ("first", "judged", "snapshot"), [(1, 1, 0), (1, 40, 0), (3, 48, 0), (12, 45, 0), (47, 48, 44)]
)
def test_a_verdict_however_late_finds_the_past_of_its_first_step(fit, tmp_path, first, judged, snapshot) -> None:
    (capsule,) = capsules(fit, tmp_path, Verdicts({judged: first})).values()

    assert span(capsule) == (snapshot, snapshot + 1, min(first + 4, judged))
    assert capsule.manifest.event.kind == "full"
    assert capsule.manifest.note == ""


def test_the_past_of_a_suspicion_that_has_ended_is_still_there(fit, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(capsule_writer, "_LATE", 4)
    over = dict.fromkeys(range(19, 24), 18) | dict.fromkeys(range(31, 34), 30)

    (capsule,) = capsules(fit, tmp_path, Verdicts({46: 18}, suspected=over)).values()

    assert span(capsule) == (12, 13, 22)
    assert capsule.manifest.note == ""


def test_a_full_divergence_of_which_nothing_is_left_has_the_steps_before_its_verdict(
    fit, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(capsule_writer, "_LATE", 0)

    (capsule,) = capsules(fit, tmp_path, Verdicts({46: 3})).values()

    assert span(capsule) == (40, 41, 46)
    assert "begins 37 steps after the first step" in capsule.manifest.note


def test_a_micro_divergence_that_turns_out_to_be_full_keeps_its_capsule(fit, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(capsule_writer, "_LATE", 4)

    over = dict.fromkeys(range(19, 24), 18) | {30: 29, 34: 33, 38: 37}  # the last two are held
    verdicts = Verdicts({46: 18}, micro={24: 18}, suspected=over)

    (capsule,) = capsules(fit, tmp_path, verdicts).values()

    assert span(capsule) == (12, 13, 22)
    assert (capsule.manifest.event.kind, capsule.manifest.event.judged_at) == ("full", 46)


def test_the_last_full_divergence_has_a_capsule_also_if_there_are_enough(fit, tmp_path) -> None:
    verdicts = Verdicts({20: 19, 30: 29, 44: 43}, micro={12: 11, 16: 15})

    kept = capsules(fit, tmp_path, verdicts, max_capsules=2)

    assert list(kept) == ["step=11", "step=43"]


def test_after_a_change_between_two_batches_a_capsule_starts_there(fit, tmp_path) -> None:
    class Doubled(Stability):
        def _rolled_back(self, fit, events, detector):
            return any(event.step == 21 for event in events)

    writer = CapsuleWriter(
        steps_before=2, steps_after=4, folder=RunFolder(tmp_path), cfg=OmegaConf.create({"seed": 0}), events="full"
    )
    fit(
        stability=Doubled(
            divergence=Verdicts({24: 21, 32: 26}), snapshots=SnapshotRing(every=4, keep=6), capsules=writer
        )
    )

    assert span(Capsule.load(tmp_path / "capsules" / "step=26")) == (24, 25, 30)
