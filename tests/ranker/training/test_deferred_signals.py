"""Signals that are computed for several batches at once are those of one batch after another, to the bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ranker.data.schema import DenseFeature, Schema, Task
from ranker.metrics import StreamingAUC
from ranker.stability import pack
from ranker.training import deferred_signals, lean_loop
from ranker.training.deferred_signals import KEPT, DeferredSignals
from ranker.training.training_step import Seen, step_signals
from support import CALM, metrics

TASKS = (Task(name="click"), Task(name="watch", type="regression"), Task(name="like"))
SCHEMA = Schema(name="toy", time_column="t", dense=(DenseFeature(name="x"),), tasks=TASKS)


def trained() -> Any:
    return SimpleNamespace(train_auc=StreamingAUC(SCHEMA))


def batch(number: int, rows: int = 100, *, weights: bool = False, ranking: bool = False) -> Seen:
    draw = torch.Generator().manual_seed(number)
    logits_BT = torch.randn(rows, 3, generator=draw) * 10.0 ** (number % 5 - 2)
    if number % 7 == 3:
        logits_BT[0, number % 3] = torch.nan
    return Seen(
        logits_BT=logits_BT,
        labels_BT=torch.rand(rows, 3, generator=draw).round(),
        mask_BT=torch.rand(rows, 3, generator=draw) < 0.7,
        losses_T=torch.rand(3, generator=draw),
        weight_B=torch.rand(rows, generator=draw) if weights else None,
        ranking_T=torch.rand(3, generator=draw) if ranking else None,
    )


BATCHES = {
    "plain": [batch(i) for i in range(2 * KEPT + 3)],
    "sizes and row weights in turns": [
        batch(i, rows=100 + i // 3, weights=i % 5 == 0, ranking=i % 4 == 1) for i in range(20)
    ],
    "large": [batch(i, rows=20_000) for i in range(3)],
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("threads", [1, 2])
def test_they_are_those_of_one_batch_after_another(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        late, each = trained(), trained()
        queue = DeferredSignals(late)
        found = [queue.add(seen) for seen in BATCHES[name]]
        expected = [step_signals(each, **vars(seen)) for seen in BATCHES[name]]
        for ours, theirs in zip(found, expected, strict=True):
            for field, value in vars(theirs).items():
                mine = getattr(ours.values(), field)
                if value is None:
                    assert mine is None, field
                else:
                    assert torch.equal(mine.nan_to_num(-1.0), value.nan_to_num(-1.0)), field
            assert torch.equal(ours.packed().nan_to_num(-1.0), theirs.packed().nan_to_num(-1.0))
        assert torch.equal(late.train_auc.get_extra_state(), each.train_auc.get_extra_state())
    finally:
        torch.set_num_threads(1)


def test_they_wait_until_somebody_reads_one() -> None:
    queue = DeferredSignals(owner := trained())
    found = [queue.add(batch(i)) for i in range(3)]
    assert not any(signals.is_known for signals in found)

    _ = found[1].auc_T
    assert all(signals.is_known for signals in found)

    waiting = queue.add(batch(3))
    before = owner.train_auc._histogram_TCK.clone()
    assert not torch.equal(owner.train_auc.get_extra_state(), before), "a checkpoint has every batch"
    assert waiting.is_known


def test_a_state_that_is_put_back_is_not_changed_by_batches_from_before() -> None:
    queue = DeferredSignals(owner := trained())
    queue.add(batch(0))
    kept = owner.train_auc.get_extra_state().clone()
    queue.add(batch(1))
    owner.train_auc.set_extra_state(kept)
    assert torch.equal(owner.train_auc.get_extra_state(), kept)


def test_no_more_than_a_few_batches_are_held() -> None:
    queue = DeferredSignals(trained())
    found = [queue.add(batch(i)) for i in range(KEPT)]
    assert all(signals.is_known for signals in found)


def test_several_ranks_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        deferred_signals, "dist", SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True)
    )
    assert DeferredSignals(trained()).add(batch(0)).is_known


def test_the_step_cut_joins_the_row() -> None:
    signals = DeferredSignals(trained()).add(seen := batch(0))
    cut_3 = torch.tensor([2.0, 1.0, 0.5])
    signals.after_step(SimpleNamespace(update=lambda: cut_3))  # type: ignore[arg-type]
    alone = step_signals(trained(), **vars(seen))
    expected = pack(**(alone.as_dict() | {"step_cut_3": cut_3}))
    assert torch.equal(signals.packed().nan_to_num(-1.0), expected.nan_to_num(-1.0))
    assert torch.equal(pack(**signals.values().as_dict()).nan_to_num(-1.0), expected.nan_to_num(-1.0))


def test_a_run_has_the_numbers_of_one_with_lightnings_loop_and_signals_at_every_step(
    tmp_path: Path, train_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*CALM, "train.checkpoint_every=12", "train.log_every=5", "callbacks.early_signs.every=7")
    lean = train_tiny(tmp_path / "lean", *options)
    monkeypatch.setattr(lean_loop, "use", lambda trainer: None)
    monkeypatch.setattr(deferred_signals, "KEPT", 1)
    plain = train_tiny(tmp_path / "plain", *options)

    assert metrics(lean.folder) == metrics(plain.folder)
    files = [sorted((run.folder / "checkpoints").glob("*.ckpt")) for run in (lean, plain)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] != []
    for ours, theirs in zip(*files, strict=True):
        a, b = torch.load(ours, weights_only=True), torch.load(theirs, weights_only=True)
        assert a.keys() == b.keys()
        assert a["loops"] == b["loops"]
        for name, value in b["state_dict"].items():
            assert torch.equal(a["state_dict"][name], value), name
        for part in ("callbacks", "recent", "train_auc_by_rank", "optimizer_states"):
            if part in b:
                assert str(a[part]) == str(b[part]), part
