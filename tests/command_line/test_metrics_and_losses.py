"""``metrics=``, ``loss=``, row weights and ``data.keep_groups`` from the command line to summary.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ranker.runs.metric_names import COMMON
from ranker.runs.run_folder import RunFolder
from support import CALM, TINY, TWO_RANKS, Finished, finished, metrics, train_process

RANKED = ("loss=softmax", "data.log.row_weights=0.5", "data.keep_groups=user")
LOST = (
    *CALM,
    "optim=adagrad",
    "lr_mult=300",
    "data.log.train_rows=25600",
    "scale.batch_size=128",
    "train.eval_every=0",
)


@pytest.fixture(scope="module")
def full(train_tiny: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    segments = "+metrics.extra.segments={_target_: ranker.metrics.SegmentedNE, feature: hour}"
    options = ("metrics=full", segments, "metrics.intervals.resamples=20", "objective=test/click/gauc.user")
    return train_tiny(tmp_path_factory.mktemp("full"), *RANKED, *options)


def test_the_summary_has_metrics_intervals_and_tables(full: Finished) -> None:
    found = full.summary["metrics"]
    for name in ("click/gauc.user", "like/ndcg_10.user", "click/ne.hour", "watch_time/xauc", "watch_time/mae_raw"):
        assert found[f"test/{name}"] > 0, name
    intervals = full.summary["intervals"]
    assert intervals.pop("level") == 0.95
    for name, (low, high) in intervals.items():
        assert low <= found[name] <= high, name
    assert "test/click/auc" in intervals
    assert "test/click/gauc.user" in intervals
    tables = {(table["task"], table["name"]): table for table in full.summary["tables"]}
    assert sum(row[0] for row in tables["click", "calibration"]["rows"]) == found["test/click/observed"]
    assert sum(row[1] for row in tables["click", "ne.hour"]["rows"]) == found["test/click/observed"]


def test_metrics_that_have_no_task_are_named_when_the_run_starts(
    train_tiny: Callable[..., Finished], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_tiny(tmp_path, "metrics=ranking", "data.tasks=[watch_time]", "train.max_steps=2", "train.eval_every=0")
    assert "metrics.extra: gauc, ndcg, recall, mrr compute nothing" in "".join(capfd.readouterr())


def test_curves_have_the_ranking_loss_and_the_metrics_while_training(full: Finished) -> None:
    rows = metrics(full.folder)
    last = [row for row in rows if "train/click/softmax" in row][-1]
    weights = {"click": 1.0, "like": 1.0, "share": 1.0, "follow": 1.0}
    trained = sum(float(last[f"train/{task}/loss"]) + float(last[f"train/{task}/softmax"]) for task in weights)
    trained += sum(float(last[f"train/{task}/loss"]) for task in ("rating", "watch_time"))
    assert float(last["train/loss"]) == pytest.approx(trained, rel=1e-5)
    assert "train/rating/softmax" not in last
    for phase in ("val", "progressive", "test"):
        assert any(f"{phase}/click/gauc.user" in row for row in rows), phase
    assert (full.folder / "checkpoints" / "best").is_dir()


def test_metrics_change_nothing_of_the_training_and_its_hash(
    full: Finished, train_tiny: Callable[..., Finished], tmp_path: Path
) -> None:
    plain = train_tiny(tmp_path, *RANKED)
    assert {name.split("/")[2] for name in plain.summary["metrics"]} == set(COMMON)
    assert "intervals" not in plain.summary
    assert plain.summary["config_hash"] == full.summary["config_hash"]
    for one, other in zip(metrics(plain.folder), metrics(full.folder), strict=True):
        assert other.items() >= one.items()
    RunFolder(full.folder).load_config()  # what it names may be built again


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["metrics=rankng"], "unknown metrics 'rankng'; did you mean 'ranking'"),
        (["loss=jcr"], "unknown loss 'jcr'; did you mean 'jrc'"),
        (["loss=jrc", "loss.ranking.alpha=0"], "loss.ranking.alpha must be above 0 and at most 1, got 0"),
        (["loss=bpr", "loss.ranking.tasks=[rating]"], "loss.ranking.tasks: 'rating' is no binary task"),
        (["loss=bpr", "+loss.ranking.margin=1"], "loss.ranking: "),
        (["metrics=ranking", "metrics.extra.gauc.group=usr"], "schema 'synthetic' has no group 'usr'; did you mean"),
        (["metrics=ranking", "metrics.extra.ndcg.k=0"], "k of ndcg must be a whole number of at least 1, got 0"),
        (["metrics=full", "metrics.intervals.resamples=3"], "metrics.intervals.resamples must be 0 (none) or"),
        (["+metrics.extra.mine._target_=builtins.dict"], "metrics.extra.mine is no RowMetric"),
        (["data.keep_groups=usr"], "data.keep_groups: no group 'usr'; did you mean 'user'"),
        (["data.log.row_weights=-1"], "row_weights must be between 0 (none) and 5, got -1"),
        (["metrics=ranking", "objective=test/click/gauc"], "did you mean"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_said_in_one_line(
    overrides: list[str],
    said: str,
    command_line: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line("logger=csv", *overrides, f"hydra.run.dir={tmp_path}")
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert said in lines[0]
    assert lines[1:] == ["(HYDRA_FULL_ERROR=1 shows where)"]


@pytest.mark.slow
def test_two_processes_measure_and_train_as_one(tmp_path: Path) -> None:
    """Groups are not split between ranks, so the ranking loss is the same; sums differ by rounding."""
    options = (*RANKED, "loss=jrc", "metrics=full", "metrics.intervals.resamples=20", "train.log_every=1")
    found = []
    for name, ranks in (("one", ()), ("two", TWO_RANKS)):
        process = train_process(*TINY, *options, *ranks, f"hydra.run.dir={tmp_path / name}")
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
        found.append(finished(tmp_path / name))
    one, two = found
    assert two.summary["world_size"] == 2
    first, again = (next(row for row in metrics(run.folder) if "train/loss" in row) for run in found)
    for name in ("train/loss", "train/click/jrc", "train/click/loss"):
        assert float(again[name]) == pytest.approx(float(first[name]), rel=1e-4), name
    for name, value in one.summary["metrics"].items():
        assert two.summary["metrics"][name] == pytest.approx(value, rel=0.05, abs=0.02), name


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["bpr", "softmax", "jrc"])
def test_the_detector_finds_a_divergence_and_only_that(
    loss: str, train_tiny: Callable[..., Finished], tmp_path: Path
) -> None:
    options = (f"loss={loss}", "data.keep_groups=user", "data.log.row_weights=0.5")
    lost = train_tiny(tmp_path / "lost", *LOST, *options)
    assert lost.summary["status"] == "diverged"
    assert len(list((lost.folder / "capsules").iterdir())) == 1
    kept = train_tiny(tmp_path / "kept", *LOST, *options, "optim=clippy", "lr_mult=1")
    assert kept.summary["status"] == "completed"
    assert kept.summary["divergence"]["full"] is False
    assert json.loads((kept.folder / "summary.json").read_text())["metrics"]["test/click/auc"] > 0.5
