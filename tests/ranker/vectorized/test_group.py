"""A replica of a group gives what its job gives alone: every optimizer, every model, each order, lost neighbours."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from optim import list_optimizers
from ranker.installation import conf_folder
from support import Finished
from vectorized_support import QUICK_VERDICT, job_config, summary

Train = Callable[..., list[Path]]
MODELS = ("small", "large", "large_dcn", "moe", "ple")
OPTIMIZERS = sorted(path.stem for path in (conf_folder() / "optim").glob("[!_]*.yaml"))
SHORT = ("train.max_steps=10", "data.log.eval_rows=512", "train.eval_every=5")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(one: Path, other: Path, *, rel: float = 1e-3) -> None:
    """The same verdict, events, steps and metrics, up to rounding."""
    first, second = summary(one), summary(other)
    for name in ("metrics", "adapted"):
        assert first.pop(name, {}) == pytest.approx(second.pop(name, {}), rel=rel, abs=1e-4, nan_ok=True)
    assert first == second
    for mine, its in zip(rows(one), rows(other), strict=True):
        assert {k: float(v) for k, v in mine.items() if v} == pytest.approx(
            {k: float(v) for k, v in its.items() if v}, rel=rel, abs=1e-3, nan_ok=True
        )


def test_a_group_of_one_is_the_run_alone_to_the_bit(
    train_jobs: Train, train_tiny: Callable[..., Finished], tmp_path: Path
) -> None:
    job = ("seed=3", "lr_mult=1.5", "train.warmup_steps=7")

    alone = train_tiny(tmp_path / "alone", *job)
    (folder,) = train_jobs("group", job)

    assert (folder / "metrics.csv").read_bytes() == (alone.folder / "metrics.csv").read_bytes()
    assert summary(folder) == summary(alone.folder)
    assert (folder / "config.yaml").read_bytes() == (alone.folder / "config.yaml").read_bytes()
    for name in ("log.json", "schema.yaml"):
        assert (folder / name).read_bytes() == (alone.folder / name).read_bytes()


@pytest.mark.slow
def test_every_optimizer_has_a_configuration_that_is_tested_here() -> None:
    configured = {str(job_config(f"optim={name}").optim.name) for name in OPTIMIZERS}
    assert configured == set(list_optimizers())


# A rule each way. Adagrad and Clippy are those of the other tests here; the rest are slow tests.
QUICK = ("lamb", "clippy_adamw")


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in OPTIMIZERS])
def test_each_optimizer_steps_a_replica_as_alone(train_jobs: Train, name: str) -> None:
    rate = "lr_mult=0.01" if "adam" in name else "lr_mult=0.5"
    jobs = [(*SHORT, f"optim={name}", rate, f"seed={seed}") for seed in (0, 1)]
    jobs.append((*SHORT, "optim=adagrad", "seed=2", "optim.initial_accumulator_value=1e-3"))

    together = train_jobs("together", *jobs)
    (alone,) = train_jobs("alone", jobs[1])

    assert_same(together[1], alone)
    assert summary(together[0])["metrics"] != summary(together[1])["metrics"]


@pytest.mark.parametrize("model", [pytest.param(x, marks=() if x == "ple" else pytest.mark.slow) for x in MODELS])
def test_each_model_trains_as_alone(train_jobs: Train, model: str) -> None:
    wide = ("++model.widths.small.laptop=[48,48]", "model.net.tower=[6]")
    jobs = [(*SHORT, *wide, f"model={model}", f"seed={seed}", f"lr_mult={1 + seed}") for seed in (0, 1, 2)]

    together = train_jobs("together", *jobs)
    (alone,) = train_jobs("alone", jobs[2])

    assert_same(together[2], alone)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["model.net.sparse_embeddings=true", "model.net.layer_norm=true", "train.epochs=2"])
def test_settings_that_change_the_step_hold_in_a_group(train_jobs: Train, setting: str) -> None:
    jobs = [(*SHORT, "model=large_dcn", setting, f"seed={seed}", "data.log.train_rows=1280") for seed in (0, 1)]

    together = train_jobs("together", *jobs)
    (alone,) = train_jobs("alone", jobs[1])

    assert_same(together[1], alone)


@pytest.mark.slow
def test_normalised_features_are_those_of_a_run_alone(train_jobs: Train) -> None:
    jobs = [(*SHORT, "data.dense_statistics=past_windows", "data.window=512", f"seed={seed}") for seed in (0, 1)]

    together = train_jobs("together", *jobs)
    (alone,) = train_jobs("alone", jobs[1])

    assert_same(together[1], alone)


def test_replicas_share_an_order_or_have_their_own(train_jobs: Train) -> None:
    jobs = [(*SHORT, f"seed={seed}") for seed in (0, 1)]

    shared = train_jobs("shared", *jobs, order="shared", order_seed=0)
    own = train_jobs("own", *jobs)
    (as_seed_0,) = train_jobs("alone", jobs[1], order="shared", order_seed=0)

    assert_same(shared[0], own[0])  # seed 0 has its own order in both
    assert_same(shared[1], as_seed_0)
    assert summary(shared[1])["metrics"] != summary(own[1])["metrics"]
    said = json.loads((shared[1] / "summary.json").read_text())
    assert (said["vectorized"], said["vectorized_order"], said["order_seed"], said["seed"]) == (2, "shared", 0, 1)


LOST = ("optim=adagrad", "lr_mult=200", "callbacks.divergence.poll_every=2")


@pytest.mark.parametrize("order_seed", [pytest.param(0, marks=pytest.mark.slow), None])
def test_a_lost_replica_leaves_and_the_others_do_not_notice(
    train_jobs: Train, train_tiny: Callable[..., Finished], tmp_path: Path, order_seed: int | None
) -> None:
    jobs = [("seed=0", *QUICK_VERDICT), (*LOST, *QUICK_VERDICT, "seed=1"), ("seed=3", "lr_mult=2", *QUICK_VERDICT)]

    together = train_jobs("together", *jobs, order_seed=order_seed)
    alone = [train_jobs(f"alone{n}", job, order_seed=order_seed)[0] for n, job in enumerate(jobs)]

    assert summary(together[1])["status"] == "diverged"
    assert summary(together[1])["steps"] < summary(together[2])["steps"] == 24
    for mine, its in zip(together, alone, strict=True):
        assert_same(mine, its, rel=5e-2)
        events = [folder / "events.jsonl" for folder in (mine, its)]
        assert [e.is_file() for e in events] in ([True, True], [False, False])
        if events[0].is_file():
            said = [[json.loads(line) for line in e.read_text().splitlines()] for e in events]
            assert [(e["kind"], e["step"], e["judged_at"]) for e in said[0]] == [
                (e["kind"], e["step"], e["judged_at"]) for e in said[1]
            ]
    if order_seed is None:  # what a run of Lightning leaves, with its last evaluation
        really = train_tiny(tmp_path / "really", *jobs[1])
        assert_same(together[1], really.folder, rel=5e-2)


def test_a_job_that_cannot_be_built_is_left_out(train_jobs: Train) -> None:
    jobs = [(*SHORT, "seed=0"), (*SHORT, "seed=1", "optim.lambda_rel=-1"), (*SHORT, "seed=2")]

    together = train_jobs("together", *jobs)

    assert [(folder / "summary.json").is_file() for folder in together] == [True, False, True]
    assert json.loads((together[2] / "summary.json").read_text())["vectorized"] == 2


@pytest.mark.slow
def test_a_replica_with_infinite_weights_harms_nobody(train_jobs: Train) -> None:
    jobs = [(*SHORT, "seed=0"), (*SHORT, "optim=clippy_sgd", "optim.lambda_abs=1e30", "lr_mult=1e30", "seed=1")]

    together = train_jobs("together", *jobs)
    (alone,) = train_jobs("alone", jobs[0])

    assert summary(together[1])["metrics"]["test/click/nonfinite"] > 0
    assert_same(together[0], alone)
