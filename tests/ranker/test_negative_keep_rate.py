"""Negatives that were dropped from the log: what the model learns, what metrics say, and what the card tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from daily_log import SCHEMA, SETTINGS, rows_of, write_log
from ranker.data.batch import Batch
from ranker.data.columns import Task
from ranker.data.schema import DenseFeature, Schema
from ranker.data.sources import prepared
from ranker.errors import UserError
from ranker.export.release import Candidate, Weights
from ranker.losses import MultitaskLoss, best_constants
from ranker.metrics import CalibrationBuckets, TaskMetrics
from ranker.metrics.statistic import Intervals
from ranker.parts import make_net
from ranker.runs.run_folder import RunFolder
from support import finished

Q = 0.1


def schema(rate: float) -> Schema:
    tasks = (Task(name="click", negative_keep_rate=rate), Task(name="like"), Task(name="watch", type="regression"))
    return Schema(name="own", time_column="ts", dense=(DenseFeature(name="x"),), tasks=tasks)


def world(rows: int = 400_000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """True logits, labels, and which rows are kept: all with a click, a tenth of the others."""
    draw = torch.Generator().manual_seed(0)
    x_B = torch.randn(rows, generator=draw)
    logits_BT = torch.stack([1.5 * x_B - 3, 0.5 * x_B, x_B], dim=1)
    labels_BT = (torch.rand(rows, 3, generator=draw) < logits_BT.sigmoid()).float()
    kept_B = (labels_BT[:, 0] > 0) | (torch.rand(rows, generator=draw) < Q)
    return logits_BT, labels_BT, kept_B


def test_the_loss_is_that_of_the_logit_on_kept_rows() -> None:
    z, y, mask = torch.randn(50, 3), (torch.rand(50, 3) < 0.5).float(), torch.rand(50, 3) < 0.8
    found = MultitaskLoss(schema(Q))(z, y, mask).task_T
    p = torch.sigmoid(z[:, 0].double())
    of_kept = p / (p + (1 - p) * Q)  # He et al., the other way round
    expected = F.binary_cross_entropy(of_kept, y[:, 0].double(), reduction="none")[mask[:, 0]].mean()
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-5)
    plain = MultitaskLoss(schema(1.0))(z, y, mask).task_T
    assert torch.equal(found[1:], plain[1:]), "other tasks are as they were"


def test_what_minimises_the_loss_on_kept_rows_is_the_logit_of_the_whole_log() -> None:
    logits_BT, labels_BT, kept_B = world()
    x_B, y_BT = logits_BT[kept_B, 2], labels_BT[kept_B]
    loss, mask = MultitaskLoss(schema(Q)), torch.ones_like(y_BT, dtype=torch.bool)
    mask[:, 1:] = False
    weights = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = loss((weights[0] * x_B + weights[1])[:, None].expand(-1, 3), y_BT, mask).total
        total.backward()
        return total

    optimizer.step(closure)
    assert weights.tolist() == pytest.approx([1.5, -3.0], abs=0.05)


def test_a_head_begins_at_the_rate_of_the_whole_log() -> None:
    _, labels_BT, kept_B = world()
    whole = best_constants(schema(1.0), labels_BT, torch.ones_like(labels_BT, dtype=torch.bool))
    y_BT = labels_BT[kept_B]
    found = best_constants(schema(Q), y_BT, torch.ones_like(y_BT, dtype=torch.bool))
    assert found[0].item() == pytest.approx(whole[0].item(), abs=0.03)


def test_metrics_of_kept_rows_are_those_of_the_whole_log() -> None:
    logits_BT, labels_BT, kept_B = world()
    seen_BT = torch.ones_like(labels_BT, dtype=torch.bool)
    found = {}
    for name, rate, rows in (("whole", 1.0, slice(None)), ("kept", Q, kept_B), ("uncorrected", 1.0, kept_B)):
        metrics = TaskMetrics(schema(rate), intervals=Intervals(resamples=20))
        for part in torch.arange(len(labels_BT))[rows].chunk(3):
            metrics.update(logits_BT[part], labels_BT[part], seen_BT[part])
        found[name] = metrics.compute(final=True)
        found[f"{name} ends"] = metrics.intervals
    for name in ("auc", "logloss", "ne", "calibration"):
        assert found["kept"][f"click/{name}"] == pytest.approx(found["whole"][f"click/{name}"], rel=0.01), name
    assert found["kept"]["click/observed"] == kept_B.sum()
    assert found["uncorrected"]["click/calibration"] < 0.5
    assert found["kept"]["like/ne"] == found["uncorrected"]["like/ne"]
    low, high = found["kept ends"]["click/ne"]
    assert low < found["kept"]["click/ne"] < high, "computed from rows, with the same weights"


def test_row_weights_and_sampled_negatives_multiply() -> None:
    """A kept negative of weight w counts like a row of weight w / q in a log without the option."""
    rows = 200
    draw = torch.Generator().manual_seed(1)
    z, y = torch.randn(rows, 1, generator=draw), (torch.rand(rows, 1, generator=draw) < 0.4).float()
    weight_B = torch.rand(rows, generator=draw) + 0.1
    found = []
    for rate, w_B in ((0.25, weight_B), (1.0, torch.where(y[:, 0] > 0, weight_B, weight_B / 0.25))):
        tasks = (Task(name="click", negative_keep_rate=rate),)
        made = Schema(name="own", time_column="ts", dense=(DenseFeature(name="x"),), tasks=tasks, weight="w")
        metrics = TaskMetrics(made, extra=[CalibrationBuckets(buckets=5)])
        nothing = torch.zeros(rows, dtype=torch.int64)
        metrics.add(
            z,
            Batch(
                dense_BF=z,
                onehot_BC=nothing[:, None][:, :0],
                ragged={},
                labels_BT=y,
                mask_BT=torch.ones_like(y, dtype=torch.bool),
                time_ms_B=nothing,
                row_B=nothing,
                weight_B=w_B,
                groups_BG=None,
            ),
        )
        found.append(metrics.compute())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_run_on_a_sampled_log_is_calibrated_on_the_whole_one(
    command_line: Callable[..., None], tmp_path: Path
) -> None:
    """Rates of the export come from the same logits, so they need no correction."""
    log = write_log(tmp_path / "log", 0)
    draw = np.random.default_rng(0)
    for day in range(3):
        rows = rows_of(day, 6000)
        kept = (rows["click"] == 1).to_numpy() | (draw.random(len(rows)) < 0.2)
        rows.filter(pl.Series(kept)).write_parquet(log / f"day={day}.parquet")
    metrics = {}
    for name, text in (("corrected", "{name: click, negative_keep_rate: 0.2}"), ("not", "{name: click}")):
        (log / "schema.yaml").write_text(SCHEMA.replace("{name: click}", text))
        folder = tmp_path / name
        command_line(
            *SETTINGS,
            f"data.source={log}",
            f"hydra.run.dir={folder}",
            "callbacks=none",
            "scale.batch_size=256",
            "train.epochs=4",
        )
        metrics[name] = finished(folder).summary["metrics"]
        card = json.loads((folder / "checkpoints" / "model_card.json").read_text())
        assert card["negatives_kept"] == ({"click": 0.2} if name == "corrected" else {})
        words = "Share of the negatives in the log: click 0.2."
        assert (words in (folder / "checkpoints" / "MODEL_CARD.md").read_text()) == (name == "corrected")
    scores = {
        name: _scores(tmp_path / name, log, schema_text)
        for name, schema_text in (("corrected", "{name: click, negative_keep_rate: 0.2}"), ("not", "{name: click}"))
    }
    rate = float(rows_of(2, 6000)["click"].to_numpy().mean())
    assert scores["corrected"] == pytest.approx(rate, abs=0.05)
    assert scores["not"] > rate + 0.1
    assert metrics["corrected"]["test/click/calibration"] == pytest.approx(1, abs=0.1)
    assert metrics["corrected"]["test/click/auc"] == pytest.approx(metrics["not"]["test/click/auc"], abs=0.02)


def _scores(folder: Path, log: Path, click: str) -> float:
    """Mean score of the last day with all its rows, by a run's weights."""
    whole = log.with_name(f"whole_{folder.name}")
    whole.mkdir()
    (whole / "schema.yaml").write_text(SCHEMA.replace("{name: click}", click))
    for day in (1, 2):
        rows_of(day, 6000).write_parquet(whole / f"day={day}.parquet")
    cfg = RunFolder.existing(folder).load_config()
    opened = prepared(root=str(whole))
    weights = Weights.read(RunFolder.existing(folder).newest_checkpoint())
    candidate = Candidate.load(make_net(cfg, opened.schema), weights, log=opened, eval_batch_size=4096)
    with torch.no_grad():
        return float(candidate.net(opened.read(6000, 12000))[:, 0].sigmoid().mean())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"negative_keep_rate": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"negative_keep_rate": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"negative_keep_rate": float("nan")}, "above 0 and at most 1, got nan"),
        ({"negative_keep_rate": 0.5, "type": "regression"}, "is for binary tasks; give rows a weight instead"),
    ],
)
def test_a_wrong_rate_is_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Task(name="click", **options)
