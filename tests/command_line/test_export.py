"""From a run to scores by two commands: a sound model is handed out and scores as it did, a broken one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.runs.checkpoint_files import by_step
from support import TINY

DAY_MS = 86_400_000
ROWS, HELD_OUT = 2048, 700
STEPS = ROWS // 256
SCHEMA = Schema(
    name="shop",
    time_column="t",
    row_id="event",
    dense=(DenseFeature(name="price", transform="log1p", fill_null=0.0),),
    categorical=(
        CategoricalFeature(name="user", hash_buckets=50),
        CategoricalFeature(name="country", vocabulary=("fr", "de")),
        CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=9),
        CategoricalFeature(name="seen", kind="sequence", table="user", max_length=3),
    ),
    tasks=(Task(name="click"), Task(name="watch", type="regression", transform="log1p", scale=1e-3)),
)
LENIENT = ["--min-auc", "0", "--max-auc-drop", "1", "--min-calibration", "0", "--max-calibration", "100"]


def day(number: int, rows: int) -> pa.Table:
    """A day of a shop whose clicks go with the price, with nulls, unknown words, long and empty lists."""
    draw = np.random.default_rng(number)
    price = draw.lognormal(size=rows)
    click = draw.random(rows) < 1 / (1 + np.exp(2 - 2 * price))
    user = [f"u{i}" for i in draw.integers(0, 80, rows)]
    return pa.table(
        {
            "t": number * DAY_MS + np.arange(rows, dtype=np.int64) * (DAY_MS // rows),
            "event": np.arange(rows, dtype=np.int64) * 3 + number,
            "price": pa.array(price, mask=np.arange(rows) % 17 == 0),
            "user": user,
            "country": [("de", "fr", None, "es")[i] for i in draw.integers(0, 4, rows)],
            "tags": [draw.integers(0, 9, i % 4).tolist() for i in range(rows)],
            "seen": [user[max(0, i - i % 6) : i] for i in range(rows)],
            "click": click.astype(np.int8),
            "watch": np.where(click, price * 4000, 500.0),
        }
    )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shop")
    SCHEMA.to_yaml(root / "schema.yaml")
    pq.write_table(day(19_000, ROWS), root / "day=1.parquet", row_group_size=500)
    pq.write_table(day(19_001, HELD_OUT), root / "day=2.parquet", row_group_size=300)
    return root


@pytest.fixture(scope="module")
def trained(command_line: Callable[..., None], shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    command_line(
        *(override for override in TINY if not override.startswith("data.")),
        "data=parquet",
        f"data.root={shop}",
        "data.dense_statistics=past_windows",
        "data.window=512",
        "train.checkpoint_every=8",
        "train.eval_every=4",
        "lr_mult=2",
        "model=large_dcn",
        f"hydra.run.dir={folder}",
    )
    return folder


@pytest.fixture
def export(load_script: Callable[[str], ModuleType]) -> Callable[..., int]:
    module = load_script("export")
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture
def score(load_script: Callable[[str], ModuleType]) -> Callable[..., int]:
    module = load_script("score")
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be broken."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def predictions(run: Path, shop: Path) -> np.ndarray:
    """Logits of the hold-out as training's own evaluation computes them."""
    from ranker.data.datamodule import RankingDataModule
    from ranker.data.parquet_log import ParquetLog
    from ranker.parts import make_net
    from ranker.runs.run_folder import RunFolder

    folder = RunFolder.existing(run)
    checkpoint = torch.load(folder.newest_checkpoint(), weights_only=True)
    data = RankingDataModule(ParquetLog(str(shop)), batch_size=256, window=512, dense_statistics="past_windows")
    data.load_state_dict(checkpoint["RankingDataModule"])
    net = make_net(folder.load_config(), data.log.schema).eval()
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    net.load_state_dict(weights)
    with torch.inference_mode():
        return torch.cat([net(batch) for batch in data.test_dataloader()]).double().numpy()


def test_an_exported_model_scores_a_file_as_the_run_itself_does(
    export: Callable[..., int], score: Callable[..., int], trained: Path, shop: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    out = tmp_path / "export"
    unlabelled = tmp_path / "today.parquet"
    table = pq.read_table(shop / "day=2.parquet").drop_columns(["t", "click", "watch"])
    pq.write_table(table, unlabelled, row_group_size=300)

    assert export(trained, "--out", out, "--onnx", *LENIENT) == 0
    for form in ("pt2", "onnx"):
        arguments = ["--out", tmp_path / f"{form}.parquet", "--format", form, "--batch-rows", 128]
        assert score(out, unlabelled, *arguments) == 0

    logits = predictions(trained, shop)
    for form in ("pt2", "onnx"):
        scores = pq.read_table(tmp_path / f"{form}.parquet")
        assert scores["event"].to_pylist() == table["event"].to_pylist()
        np.testing.assert_allclose(scores["click"].to_numpy(), 1 / (1 + np.exp(-logits[:, 0])), rtol=1e-4)
        watch = np.sign(logits[:, 1]) * np.expm1(np.abs(logits[:, 1])) * 1000
        np.testing.assert_allclose(scores["watch"].to_numpy(), watch, rtol=1e-4, atol=1e-2)
    files = {path.name for path in out.iterdir()}
    made = {"model.pt2", "model.onnx", "schema.yaml", "export.json", "metrics.json", "gate.json", "SHA256SUMS"}
    assert files == made | {"model_card.json", "MODEL_CARD.md"}
    card = json.loads((out / "model_card.json").read_text())
    assert card["gate"]["passed"] is True
    assert card["data"]["training"] == {
        "rows": ROWS,
        "from": "2022-01-08T00:00:00+00:00",
        "to": "2022-01-08T23:59:16+00:00",
    }
    assert (card["run"], card["step"], card["parent"]) == (trained.name, STEPS, None)
    text = (out / "MODEL_CARD.md").read_text()
    assert "Passed." in text
    assert f"{card['metrics']['click/auc']:.4f}" in text
    beside = json.loads((trained / "checkpoints" / "model_card.json").read_text())
    assert beside["gate"] is None
    assert beside["metrics"]["click/auc"] == pytest.approx(card["metrics"]["click/auc"])
    assert {key: beside[key] for key in ("config_hash", "optimizer", "events", "data")} == {
        key: card[key] for key in ("config_hash", "optimizer", "events", "data")
    }
    assert json.loads((out / "gate.json").read_text())["passed"] is True
    about = json.loads((out / "export.json").read_text())
    assert about["dense_statistics"]["rows"] == ROWS
    summary = json.loads((trained / "summary.json").read_text())
    assert (about["step"], about["checkpoint"]) == (summary["steps"], "the last one")
    summary = summary["metrics"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["click/auc"] == pytest.approx(summary["test/click/auc"])


def break_weights(run: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = by_step(run / "checkpoints")[-1]
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {name: change(name, x) for name, x in saved["state_dict"].items()}
    torch.save(saved, path)


def with_nan(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, float("nan")) if name == "net.bottom.layers.1.weight" else x


def without_heads(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x) if name.startswith("net.heads.") else x


def diverge(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "diverged", "reason": "AUC back at 0.5"}))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda run: break_weights(run, with_nan), ["NaN or infinity in bottom.layers.1.weight", "click predictions"]),
        (lambda run: break_weights(run, without_heads), ["click AUC: 0.5000"]),
        (diverge, ["its status is diverged (AUC back at 0.5)"]),
        (lambda run: (run / "summary.json").unlink(), ["its status is running"]),
    ],
    ids=["nan", "chance", "diverged", "running"],
)
def test_a_broken_model_is_refused_with_reasons_and_leaves_nothing(
    broken: Callable[[Path], None],
    told: list[str],
    export: Callable[..., int],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken(run)
    before = sorted(run.rglob("*"))

    assert export(run, "--report", tmp_path / "report.json") == 2

    reasons = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refused: ")]
    for words in told:
        assert any(words in line for line in reasons), reasons
    assert sorted(run.rglob("*")) == before
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is False


def test_a_program_that_disagrees_is_refused_and_the_draft_is_gone(
    export: Callable[..., int], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ranker.export.release.difference", lambda *given: 0.5)
    before = sorted(run.rglob("*"))

    assert export(run, *LENIENT) == 2

    assert "refused: exported pt2: differs from the eager model by 0.5" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_other_weights_than_those_of_the_summary_are_exported_only_where_asked_for(
    export: Callable[..., int], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def exported(*arguments: object) -> dict[str, object]:
        assert export(run, "--force", "--out", tmp_path / "out", *LENIENT, *arguments) == 0
        return json.loads((tmp_path / "out" / "export.json").read_text())

    files = by_step(run / "checkpoints")
    summary = json.loads((run / "summary.json").read_text())
    best = json.loads((run / "checkpoints" / "best" / "best.json").read_text())
    about = exported("--best")
    assert (about["step"], about["checkpoint"]) == (best["step"], f"the best by val/click/auc ({best['value']:.4f})")

    (run / "summary.json").write_text(json.dumps(summary | {"steps": 9}))  # as if the last checkpoint were lost
    assert export(run, "--out", tmp_path / "refused") == 2
    assert "summary.json reports step 9, but the newest checkpoint is of step 8" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert exported("--checkpoint", files[-1])["step"] == 8


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/nowhere"], "no config.yaml in /nowhere"),
        (["RUN", "--gate", "defualt"], "unknown gate 'defualt'; did you mean 'default'"),
        (["RUN", "--tasks", "clik"], "no task 'clik'; did you mean 'click'"),
        (["RUN", "--checkpoint", "/nowhere"], "no checkpoint /nowhere"),
        (["RUN", "--out", "RUN"], "exists and is not an export"),
    ],
)
def test_a_mistake_of_export_is_said_in_one_line(
    arguments: list[str], told: str, export: Callable[..., int], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(*(str(trained) if argument == "RUN" else argument for argument in arguments)) == 2

    assert told in capsys.readouterr().err.splitlines()[-1]
