"""The paper's ad-hoc mitigations: each states its difference, trains, and is told apart afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ranker import config
from ranker.reports.run_table import load_runs
from ranker.stability import DivergenceDetector
from scripted_verdicts import event
from support import CALM, ROOT, Finished

DIFFERENCES = {
    "none": {},
    "warmup": {"train.warmup_steps": 400},
    "clip_activations": {"model.net.clip_activations": 10.0},
    "layer_norm": {"model.net.layer_norm": True},
    "wide_window": {"data.window": 131072},
    "global_clip": {"trainer.gradient_clip_val": 1.0},
    "skip_nonfinite": {"optim.on_nonfinite": "skip"},
}
_TRIES = {"callbacks.rollback.tries": 3}
WAYS_OUT = {
    "rollback": {},
    "rollback_rewarm": {"callbacks.rollback.lr_factor": 0.1, "callbacks.rollback.lr_steps": 200},
    "rollback_clippy": {"callbacks.rollback.optim.name": "clippy"},
    "clip_accumulator": {
        "callbacks.rollback.optim.name": "gc",
        "callbacks.rollback.optim.clip_accumulator": True,
    },
    "give_back_accumulators": {"callbacks.rollback.restore": "accumulators"},
    "rewarm": {
        "callbacks.rollback.restore": "nothing",
        "callbacks.rollback.lr_factor": 0.1,
        "callbacks.rollback.lr_steps": 200,
    },
    "switch_to_clippy": {"callbacks.rollback.restore": "nothing", "callbacks.rollback.optim.name": "clippy"},
}


TRAINED = ("layer_norm", "rollback_clippy", "give_back_accumulators", "rewarm")  # the others train as slow tests


def named(options: dict[str, dict[str, object]]) -> list[object]:
    return [pytest.param(name, marks=() if name in TRAINED else pytest.mark.slow) for name in options]


@pytest.mark.parametrize("name", [*DIFFERENCES, *WAYS_OUT])
def test_every_mitigation_states_its_difference_and_no_other(name: str) -> None:
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"mitigation={name}", "optim=adagrad", "data.warmup_steps.laptop=0"])
    config.check(cfg)
    for key, value in (_TRIES | WAYS_OUT[name] if name in WAYS_OUT else {}).items():
        assert OmegaConf.select(cfg, key) == value, key
    for other, values in DIFFERENCES.items():
        for key, value in values.items():
            assert (OmegaConf.select(cfg, key) == value) == (other == name), key


@pytest.mark.parametrize("name", named(DIFFERENCES))
def test_every_mitigation_trains_and_is_recorded(
    train_tiny: Callable[..., Finished], tmp_path: Path, name: str
) -> None:
    tiny = ("data.window", "train.warmup_steps")
    own = [f"{key}={value}" for key, value in DIFFERENCES[name].items() if key in tiny]  # over TINY's

    run = train_tiny(tmp_path, f"mitigation={name}", *own, "optim=adagrad", "train.max_steps=3", "train.eval_every=0")

    assert run.summary["mitigation"] == name
    assert load_runs(tmp_path)["mitigation"].to_list() == [name]
    cfg = OmegaConf.load(run.folder / "config.yaml")
    for other, values in DIFFERENCES.items():
        for key, value in values.items():
            assert (OmegaConf.select(cfg, key) == value) == (other == name), key


def test_every_option_is_tested() -> None:
    assert {path.stem for path in (ROOT / "conf" / "mitigation").glob("*.yaml")} == {*DIFFERENCES, *WAYS_OUT}


@pytest.mark.parametrize("name", named(WAYS_OUT))
def test_every_way_out_acts_on_a_verdict_and_is_recorded(
    train_tiny: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    poll = DivergenceDetector.poll
    once = [True]

    def lost_at_20(self, *, wait=False):
        events = poll(self, wait=wait)
        if self.buffered_until == 20 and once.pop():
            return [event(15, 20)]
        return events

    update = DivergenceDetector.update_late

    def noted(self, step, row):
        self.buffered_until = step
        update(self, step, row)

    monkeypatch.setattr(DivergenceDetector, "update_late", noted)
    monkeypatch.setattr(DivergenceDetector, "poll", lost_at_20)
    settings = ("optim=adagrad", "lr_mult=0.1", "train.eval_every=0", "data.log.train_rows=12288")

    run = train_tiny(tmp_path, f"mitigation={name}", *settings, *CALM, "callbacks.snapshots.every=5")

    assert run.summary["mitigation"] == name
    (rollback,) = run.summary["rollbacks"]
    cfg = OmegaConf.load(run.folder / "config.yaml")
    for key, value in (_TRIES | WAYS_OUT[name]).items():
        assert OmegaConf.select(cfg, key) == value, key
    assert rollback["restored"] == OmegaConf.select(cfg, "callbacks.rollback.restore")
    assert rollback["to_step"] == (rollback["snapshot_step"] if rollback["restored"] == "all" else 20)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_global_clip_bounds_all_gradients_together_sparse_ones_too(
    train_tiny: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: bool
) -> None:
    norms = []

    def note(self, optimizer):
        grads = [
            p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in self.parameters() if p.grad is not None
        ]
        norms.append(float(sum(g.square().sum() for g in grads)) ** 0.5)

    monkeypatch.setattr("ranker.training.module.RankingModule.on_before_optimizer_step", note)
    monkeypatch.setattr("ranker.training.module.RankingModule.on_before_zero_grad", note)
    settings = ("train.max_steps=3", "train.eval_every=0", f"model.net.sparse_embeddings={sparse}")

    train_tiny(tmp_path, "mitigation=global_clip", "trainer.gradient_clip_val=0.01", "optim=adagrad", *settings)

    assert norms
    assert min(n for n in norms if n) == pytest.approx(0.01, rel=1e-3)
