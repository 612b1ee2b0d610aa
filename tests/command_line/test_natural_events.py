"""Recorded runs are train.py's; their events are told by what happened afterwards; signs before them are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lead_time
import natural_events
from record_traces import runs
from recorded_runs import AFTER, BLOCK, PAST, Recorded, first_event, read, write
from support import TINY, Finished, metrics
from trace_recorder import record

TASKS = ["click", "watch_time"]


def made(*, steps: int, loss: np.ndarray | None = None, auc: float = 0.7, after: float | None = None, **meta: object):
    """A recorded run of two tasks; ``after`` is the AUC from the first loss above 3 on."""
    rng = np.random.default_rng(0)
    loss = np.exp(0.05 * rng.standard_normal(steps)) if loss is None else loss
    signals = np.zeros((steps, 7 * len(TASKS) + 4), dtype=np.float32)
    signals[:, 0] = loss
    signals[:, 4 * len(TASKS)] = 100.0  # positives of click
    blocks = steps // BLOCK
    aucs = np.full((blocks, 2), np.nan, dtype=np.float32)
    aucs[:, 0] = auc
    if after is not None:
        aucs[int(np.argmax(loss > 3)) // BLOCK :, 0] = after
    base = {
        "data": "x", "model": "small", "optim": "adagrad", "lr": 0.1, "initial_accumulator_value": 0.1, "seed": 0,
        "batch_size": 1, "tasks": TASKS, "task_types": ["binary", "regression"], "task_weights": [1.0, 1.0],
        "sign_names": [],
    }  # fmt: skip
    arrays = {"signals": signals, "block_auc": aucs, "g_log2_change": np.zeros((0, 0)), "signs": np.zeros((steps, 0))}
    return Recorded(meta=base | meta, arrays=arrays)


def spike(steps: int, at: int, height: float = 5.0, length: int = 20) -> np.ndarray:
    loss = np.exp(0.05 * np.random.default_rng(1).standard_normal(steps))
    loss[at - 1 : at - 1 + length] *= height
    return loss


def test_a_recorded_run_is_the_one_that_train_makes(train_tiny: Callable[..., Finished], tmp_path: Path) -> None:
    overrides = ["optim=gc", "train.warmup_steps=10", "optim.initial_accumulator_value=1e-3"]
    trained = train_tiny(tmp_path / "run", *overrides, "train.log_every=1", "callbacks=none")
    tiny = [word for word in TINY if not word.startswith(("logger", "trainer"))]
    run = record([*tiny, *overrides], eval_every=8, rare_every=4)
    write(run, tmp_path / "run.npz")
    run = read(tmp_path / "run.npz")

    losses = [float(row["train/loss"]) for row in metrics(trained.folder) if "train/loss" in row]
    assert run.loss_N.tolist() == pytest.approx(losses, rel=1e-6)
    held_out = trained.summary["metrics"]["test/click/auc"]
    assert run.arrays["eval_auc"][-1, run.meta["tasks"].index("click")] == pytest.approx(held_out)
    assert np.isfinite(run.sign("bottom_top/update_norm")).all()
    assert np.isfinite(run.sign("sharpness_ratio")).sum() == len(losses) // 4
    assert np.isfinite(run.sign("bottom_first/sigma_clippy")).sum() == len(losses) // 5
    g_NP = 2.0**run.log2_g_NP
    assert g_NP.shape == (len(losses), len(run.meta["g_layers"]))
    assert (g_NP[0] >= 0.99e-3).all()
    assert (np.diff(g_NP, axis=0) >= -0.01 * g_NP[:-1]).all()


def test_a_grid_becomes_runs_with_names_of_their_own() -> None:
    planned = dict(runs([["model=small,large", "seed=0,1"], ["model=small", "seed=1"]], ["data.source=/x"]))
    assert list(planned) == ["small_seed0", "small_seed1", "large_seed0", "large_seed1"]
    assert planned["large_seed1"] == ["model=large", "seed=1", "data.source=/x"]


def test_an_event_begins_at_the_first_bad_loss_of_several_after_the_start() -> None:
    def first(steps: int, at: int, height: float, length: int = 20) -> int | None:
        return first_event(spike(steps, at, height, length).tolist())

    assert first_event(np.ones(400).tolist()) is None
    assert first(400, 250, 5.0) == 250
    assert first(400, 250, np.nan) == 250
    assert first(400, 250, 5.0, length=3) == 250
    assert first(400, 250, 5.0, length=2) is None, "an outlier among the labels"
    assert first(400, PAST // 2, 5.0) is None


@pytest.mark.parametrize(
    ("after", "steps", "kind"),
    [
        (0.70, 700, "recovered"),
        (0.685, 700, "recovered"),
        (0.67, 700, "set back"),
        (0.61, 700, "lost"),
        (np.nan, 700, "lost"),
        (0.5, 440, "unsettled"),
    ],
)
def test_the_outcome_is_told_by_the_auc_beside_the_twins(after: float, steps: int, kind: str) -> None:
    hit = made(steps=steps, loss=spike(steps, 200), auc=0.6, after=after, lr=0.4)
    twins = {
        "low": made(steps=800),
        "other seed": made(steps=800, auc=0.9, seed=1),
        "gc": made(steps=800, optim="gc", auc=0.8),
    }
    found = {x.name: x for x in natural_events.outcomes({"hit": hit, **twins}, 0.02)}
    assert (found["hit"].kind, found["hit"].step) == (kind, 200)
    assert found["low"].kind == "healthy"
    assert kind == "unsettled" or found["hit"].twin == pytest.approx(0.7)
    assert natural_events.outcomes({"hit": hit}, 0.02)[0].kind == "unsettled"
    unlearned = made(steps=700, loss=spike(700, 200), auc=0.51, after=0.7)
    assert natural_events.outcomes({"hit": unlearned, **twins}, 0.02)[0].kind == "start"


def test_the_table_counts_what_the_detector_calls_by_its_right_name() -> None:
    runs = {
        "lost": made(steps=700, loss=spike(700, 200), after=0.5),
        "back": made(steps=700, loss=spike(700, 200)),
        "low": made(steps=800),
        "calm": made(steps=800),
    }
    truth = natural_events.outcomes(runs, 0.02)
    said = {
        "lost": natural_events.Verdict("lost", 200, 210, 200, 230, 200),
        "back": natural_events.Verdict("back", 0, 0, 201, 240, 200),
        "low": natural_events.Verdict("low", 0, 0, 0, 0, 0),
        "calm": natural_events.Verdict("calm", 300, 310, 0, 0, 0),
    }
    _, (full, micro) = natural_events.table(truth, {"x": said})
    assert full[2:] == ["1", "1.00 (1 of 1)", "1.00 (1 of 1)", "2", "0.50 (1 of 2)", "30", "30"]
    assert micro[2:] == ["1", "1.00 (1 of 1)", "0.00 (0 of 1)", "1", "0.00 (0 of 1)", "", ""]
    assert natural_events.false_alarms(truth, said) == (1, 2 * (800 - PAST) + 2 * (200 - PAST - 1))


def test_the_detector_of_this_version_is_asked(tmp_path: Path) -> None:
    verdict = natural_events.judge("x", _judgeable(made(steps=700, loss=spike(700, 200, 50.0))))
    assert verdict.micro == 200
    natural_events.write_rows(tmp_path / "v.csv", [verdict])
    assert natural_events.read_verdicts(tmp_path / "v.csv") == {"x": verdict}


def _judgeable(run: Recorded) -> Recorded:
    """With the losses, AUCs, spreads and labels of a model that ranks well and is not harmed."""
    rng = np.random.default_rng(2)
    signals = run.arrays["signals"]
    signals[:, 1] = 1.0  # the regression's loss
    signals[:, 2:4] = 0.7, np.nan  # running AUC
    signals[:, 4:6] = 1.0  # spread
    signals[:, 6:8] = np.nan
    signals[:, 6] = 0.7 + 0.03 * rng.standard_normal(len(signals))  # AUC of the batch
    signals[:, 9] = 0.0
    signals[:, 10:12] = 256.0  # labels
    signals[:, 12:14] = 0.24, 1.0  # their variance
    signals[:, -3:] = 1.0  # step cut
    held_out = {"eval_auc": np.array([[0.7, np.nan]]), "eval_ne": np.array([[0.9, np.nan]])}
    return Recorded(run.meta, run.arrays | held_out)


def _with_sign(seed: int, event: int | None, moves: int) -> Recorded:
    """A run whose gradient norm moves so many steps before the event, and whose logits are noise."""
    rng = np.random.default_rng(seed)
    steps = AFTER + 400
    run = made(steps=steps, loss=None if event is None else spike(steps, event))
    signs = np.exp(0.1 * rng.standard_normal((steps, 2)))
    if event is not None:
        signs[event - 1 - moves : event - 1, 0] *= 10.0
    return Recorded(run.meta | {"sign_names": ["grad_norm", "logit_max"]}, run.arrays | {"signs": signs})


def test_a_sign_that_moves_20_steps_ahead_is_found_at_leads_up_to_20_and_noise_is_not() -> None:
    made_runs = [_with_sign(s, 250 + s, 20) for s in range(12)] + [_with_sign(100 + s, None, 0) for s in range(12)]
    scores = [lead_time.scored(run) for run in made_runs]
    norm, noise = (
        lead_time.curve([found[sign] for found in scores])
        for sign in ("gradient norm, all layers (GC's sigma)", "logits")
    )
    at = norm.at(10.0)
    assert {lead: float(norm.recall[lead][at]) for lead in lead_time.LEADS} == {1: 1.0, 10: 1.0, 100: 0.0}
    assert norm.events == {1: 12, 10: 12, 100: 12}
    assert norm.lead[at] == pytest.approx(20, abs=1)
    assert max(float(noise.recall[lead][noise.at(10.0)]) for lead in lead_time.LEADS) < 0.3
    assert (np.diff(norm.alarms) >= 0).all()


def test_the_sign_of_the_event_itself_is_not_used() -> None:
    scores = lead_time.scored(_with_sign(0, 250, 0))
    run = _with_sign(0, 250, 0)
    run.arrays["signs"][249:, 0] *= 100.0  # step 250 and later
    assert lead_time.scored(run)["gradient norm, all layers (GC's sigma)"].before == (
        scores["gradient norm, all layers (GC's sigma)"].before
    )
