"""What a user gets from ``python train.py``, in process: the run folder, the verdicts, multirun."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from ranker.run_summary import never_adapted
from support import TINY, Finished, finished

Train = Callable[..., Finished]


@pytest.fixture(scope="module")
def completed(train_tiny: Train, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train_tiny(tmp_path_factory.mktemp("completed"), "optim=clippy", "train.checkpoint_every=8")


def broken_step(self: object, batch: object, batch_idx: int) -> None:
    raise RuntimeError("the disk is gone")


def metrics(run: Finished) -> list[dict[str, str]]:
    with (run.folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_sums_itself_up(completed: Finished) -> None:
    summary = completed.summary

    assert summary["status"] == "completed"
    assert (summary["model"], summary["optim"], summary["data"], summary["scale"]) == (
        "small",
        "clippy",
        "synthetic",
        "laptop",
    )
    assert summary["lr"] == summary["base_lr"] * summary["lr_mult"]
    assert summary["steps"] == 24
    assert summary["examples"] == 6144
    assert summary["examples_per_second"] > 0
    assert 0 <= summary["data_wait_fraction"] <= 1
    assert set(summary["divergence"]) == {"micro", "full", "unsettled", "first_step"}
    assert summary["parameters"]["embedding"] > summary["parameters"]["dense"] > 0
    assert set(summary["versions"]) >= {"python", "torch", "pytorch-lightning"}
    assert len(summary["config_hash"]) == 12
    assert "torch" in summary["machine"]
    assert summary["commit"] is None or len(summary["commit"].removesuffix("-dirty")) == 12


def test_the_summary_says_how_far_adagrad_adapted_though_nothing_watched(train_tiny: Train, tmp_path: Path) -> None:
    unwatched = ("callbacks=none", "train.eval_every=0")
    adapted = train_tiny(tmp_path / "low", "optim=gc", "optim.initial_accumulator_value=1e-12", *unwatched)
    assert adapted.summary["adapted"] == {"share": pytest.approx(1.0, abs=0.1), "initial_accumulator_value": 1e-12}
    never = train_tiny(tmp_path / "high", "optim=gc", "optim.initial_accumulator_value=1e6", *unwatched)
    assert never.summary["adapted"] == {"share": 0.0, "initial_accumulator_value": 1e6}
    adam = train_tiny(tmp_path / "adam", "optim=clippy_adam", "lr_mult=0.005", *unwatched)
    assert "adapted" not in adam.summary


@pytest.mark.parametrize(("share", "steps", "warned"), [(0.4999, 100, True), (0.5, 100, False), (0.0, 99, False)])
def test_a_run_whose_median_accumulator_never_left_its_start_says_so(share: float, steps: int, warned: bool) -> None:
    text = never_adapted({"adapted": {"share": share, "initial_accumulator_value": 0.1}, "steps": steps})
    assert ("Adagrad never adapted" in text) is warned
    assert ("still at its start 0.1" in text) is warned
    assert ("try optim.initial_accumulator_value=1e-06" in text) is warned


def test_a_run_without_accumulators_is_not_told_to_change_them(completed: Finished) -> None:
    assert never_adapted({"steps": 1000}) == ""
    assert never_adapted(completed.summary) == ""


def test_every_task_has_its_metrics_on_the_hold_out(completed: Finished) -> None:
    found = completed.summary["metrics"]

    tasks = {key.split("/")[1] for key in found}
    assert len(tasks) == 6
    assert 0.4 < found["test/click/auc"] < 1.0
    assert sum(key.endswith("/rmse") for key in found) == 2


def test_metrics_csv_follows_training_hold_out_and_progressive_validation(completed: Finished) -> None:
    rows = metrics(completed)

    assert [int(r["step"]) for r in rows if r["val/click/auc"]] == [8, 16, 24]
    # Three windows of 2,048 rows, each scored before it is trained on: at 0, 8 and 16 steps of 256 rows.
    assert [int(r["step"]) for r in rows if r["progressive/click/auc"]] == [0, 8, 16]
    assert all(math.isfinite(float(r["train/loss"])) for r in rows if r["train/loss"])


def test_a_checkpoint_loads_without_unpickling_code(completed: Finished) -> None:
    newest = max((completed.folder / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)

    assert torch.load(newest, weights_only=True)["global_step"] == 24


MODELS, OPTIMIZERS = ("small", "large", "large_dcn", "moe", "ple"), ("clippy", "adagrad", "gc", "agc", "lamb")
PAIRED = set(zip(MODELS, OPTIMIZERS, strict=True))  # each once; the other pairs are slow tests


@pytest.mark.parametrize(
    ("model", "optim"),
    [
        pytest.param(*pair, marks=() if pair in PAIRED else pytest.mark.slow)
        for pair in itertools.product(MODELS, OPTIMIZERS)
    ],
)
def test_every_model_trains_with_every_optimizer(train_tiny: Train, tmp_path: Path, model: str, optim: str) -> None:
    looks = ("callbacks.early_signs.every=2", "callbacks.early_signs.task_gradients=2")
    run = train_tiny(
        tmp_path, f"model={model}", f"optim={optim}", "train.max_steps=4", "train.eval_every=0", "lr_mult=0.05", *looks
    )

    assert run.summary["status"] in ("completed", "diverged")
    assert run.summary["steps"] == 4
    assert math.isfinite(run.summary["metrics"]["test/click/logloss"])
    seen = {int(row["step"]): row for row in metrics(run)}
    assert all(math.isfinite(float(seen[step]["signs/bottom_top/sigma_clippy"])) for step in (2, 4))
    assert math.isfinite(float(seen[4]["signs/task_norm/click"]))
    assert any(name.startswith("sigma/") for name in seen[4]) == (optim != "adagrad")


def test_a_lost_run_stops_early_says_why_and_is_no_failure(
    train_tiny: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_tiny(
        tmp_path,
        "optim=adagrad",
        "lr_mult=1000",
        "data.log.train_rows=51200",
        "scale.batch_size=128",
        "train.eval_every=0",
    )

    assert run.summary["status"] == "diverged"
    assert run.summary["divergence"]["full"] is True
    assert run.summary["divergence"]["first_step"] < 100
    assert run.summary["steps"] < 400
    assert "step" in run.summary["reason"]
    assert "diverged" in capsys.readouterr().out
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert events[-1]["kind"] == "full"


def test_a_crash_is_written_down_as_failed(train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranker.training.module.RankingModule.training_step", broken_step)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        train_tiny(tmp_path)

    assert finished(tmp_path).summary["status"] == "failed"
    assert "the disk is gone" in finished(tmp_path).summary["reason"]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(train_tiny: Train, tmp_path: Path) -> None:
    def test_metrics(name: str, seed: int) -> dict[str, float]:
        return train_tiny(tmp_path / name, f"seed={seed}", "train.max_steps=6", "train.eval_every=0").summary["metrics"]

    first = test_metrics("a", 0)
    assert test_metrics("b", 0) == first
    assert test_metrics("c", 1) != first


def test_chosen_tasks_and_features_are_the_only_ones_trained(train_tiny: Train, tmp_path: Path) -> None:
    run = train_tiny(
        tmp_path, "data.tasks=[click]", "data.drop_features=[user_id]", "train.max_steps=2", "train.eval_every=0"
    )

    assert {key.split("/")[1] for key in run.summary["metrics"]} == {"click"}


def test_multirun_runs_every_combination_in_folders_of_their_own(
    command_line: Callable[..., None], tmp_path: Path
) -> None:
    command_line(
        "-m",
        *TINY,
        "optim=gc,clippy",
        "seed=0,1",
        "train.max_steps=2",
        "train.eval_every=0",
        f"hydra.sweep.dir={tmp_path}",
    )

    runs = sorted(path.parent.name for path in tmp_path.glob("*/summary.json"))
    assert len(runs) == 4
    assert runs[0].startswith("synthetic_small_clippy_x1")


def tracked(folder: Path) -> dict[str, Any]:
    """What the tracker recorded, read back by its own program."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(run)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_an_offline_wandb_run_is_finished_and_comparable(train_tiny: Train, tmp_path: Path) -> None:
    train_tiny(tmp_path, "logger=wandb", "train.max_steps=2", "train.eval_every=0", "tags=[mine]")

    run = tracked(tmp_path)
    assert (run["state"], run["exit_code"]) == ("finished", 0)
    assert set(run["tags"]) == {"synthetic", "laptop", "small", "clippy", "mine"}
    assert run["config"]["optim"]["name"] == "clippy"
    assert run["config"]["model"]["net"]["hidden"] == [16, 16]  # resolved, not ${...}
    assert run["config"]["train"]["max_steps"] == 2
    assert "test/click/auc" in run["summary"]
    assert run["summary"]["divergence/micro"] == 0


def test_a_resumed_run_rewinds_wandb_to_its_checkpoint_if_asked(
    train_tiny: Train, command_line: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(tmp_path, "logger=wandb", "train.log_every=1", "train.max_steps=4", "train.checkpoint_every=2")
    checkpoints = tmp_path / "checkpoints"
    known = torch.load(checkpoints / "step=2.ckpt", weights_only=True)["tracked_rows"]
    assert 2 <= known < torch.load(checkpoints / "step=4.ckpt", weights_only=True)["tracked_rows"]
    (checkpoints / "step=4.ckpt").unlink()
    started: list[dict[str, Any]] = []
    init = wandb.init

    def recording(**settings: Any) -> Any:
        started.append(settings)
        return init(**settings)

    monkeypatch.setattr(wandb, "init", recording)
    command_line(f"resume={tmp_path}", "logger.wandb.rewind=true")

    (settings,) = started
    name = json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    assert settings["resume_from"] == f"{name}?_step={known - 1}"
    assert settings["resume"] is None
    assert finished(tmp_path).summary["steps"] == 4


def test_a_crashed_wandb_run_is_not_shown_as_finished(
    train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ranker.training.module.RankingModule.training_step", broken_step)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        train_tiny(tmp_path, "logger=wandb")

    run = tracked(tmp_path)
    assert run["exit_code"] == 1
    assert run["state"] != "finished"


def test_a_checkpoint_holds_every_weight_once(completed: Finished) -> None:
    newest = max((completed.folder / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)

    names = torch.load(newest, weights_only=True)["state_dict"]

    weights = [name for name in names if name.endswith("bottom.layers.0.weight")]
    assert len(weights) == 1, list(names)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
def test_a_compiled_net_is_watched_but_for_what_lies_inside_it(train_tiny: Train, tmp_path: Path) -> None:
    watched = ("callbacks.early_signs.every=1", "callbacks.sharpness.every=8", "callbacks.rollback.tries=1")
    plain = train_tiny(tmp_path / "plain", *watched)
    compiled = train_tiny(tmp_path / "compiled", "train.compile=true", *watched)

    assert compiled.summary["status"] == "completed"
    assert compiled.summary["sharpness"]["last_ratio"] == pytest.approx(
        plain.summary["sharpness"]["last_ratio"], rel=0.02
    )
    missing = set(metrics(plain)[-1]) - set(metrics(compiled)[-1])
    assert {name.split("/")[-1] for name in missing if not name.startswith("signs/task_")} == {
        "dead_relus",
        "activation_max",
    }
    assert "the net is compiled: no dead_relus" in (compiled.folder / "train.log").read_text()
