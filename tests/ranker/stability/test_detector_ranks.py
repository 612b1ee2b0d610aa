"""Ranks with different losses reach the same verdict at the same step."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import signal_traces as traces
from ranker.stability import DivergenceDetector, reduce_signals
from signal_traces import TASKS, healthy

STEPS = 400


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    check_joined(rank)
    trace = traces.spike(healthy(steps=STEPS, seed=rank), at=150, length=12, factor=40.0 if rank else 1.0)
    if rank == 0:
        trace = traces.not_a_number(trace, at=250, length=1)
    trace.spread_NT[319:] = 0.0  # both die; a single rank's batch may look flat by chance
    if rank == 1:
        trace.spread_NT[99:199] = 0.0
    detector = DivergenceDetector(TASKS)
    seen = []
    for i in range(STEPS):
        detector.update(i + 1, **reduce_signals(**trace.signals(i)))
        seen += detector.poll()
    torch.save({"events": [e.to_dict() for e in seen], "state": detector.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def check_joined(rank: int) -> None:
    joined = reduce_signals(
        torch.tensor([1.0, 2.0]) * (rank + 1),
        torch.tensor([0.6, float("nan")]),
        torch.tensor([3.0, 0.0]) * rank,
        torch.tensor(rank == 1),
        labels_T=torch.tensor([8.0, 4.0]),
        step_cut_3=torch.tensor([float("inf"), 3.0, 0.5]),
    )
    expected = {
        "losses_T": torch.tensor([1.5, 3.0]),
        "auc_T": torch.tensor([0.6, float("nan")]),
        "spread_T": torch.tensor([4.5**0.5, 0.0]),
        "nonfinite": torch.tensor(True),
        "labels_T": torch.tensor([8.0, 4.0]),
        "step_cut_3": torch.tensor([float("inf"), 3.0, 0.5]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(joined[name], value, equal_nan=True)
    assert reduce_signals(torch.ones(2))["auc_T"] is None
    assert joined["positives_T"] is None


def test_two_ranks_join_their_signals_and_agree_on_every_event_and_in_all_of_their_state(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert [(e["kind"], e["step"]) for e in one["events"]] == [("micro", 150), ("micro", 250), ("full", 320)]
    assert str(one) == str(two)


def test_without_processes_signals_pass_unchanged() -> None:
    losses_T = torch.ones(2)
    cut_3 = torch.tensor([2.0, 1.0, 0.5])
    passed = reduce_signals(losses_T, step_cut_3=cut_3)
    assert passed.pop("losses_T") is losses_T
    assert passed.pop("step_cut_3") is cut_3
    assert set(passed.values()) == {None}
