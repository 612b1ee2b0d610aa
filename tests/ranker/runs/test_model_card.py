"""The model card: what it says of a run, in a form for programs and one for people, whatever the run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from ranker.data.synthetic import SyntheticLog
from ranker.errors import UserError
from ranker.export.bundle import check_files, write_checksums
from ranker.runs.model_card import CARD, CARD_TEXT, as_markdown, card_of, span_of, write_card
from ranker.runs.run_folder import RunFolder

LOG = SyntheticLog(train_rows=2048, eval_rows=512, rows_per_day=1024, num_users=50, num_items=20, embedding_dim=4)
METRICS = {"click/auc": 0.7512, "click/observed": 512.0, "rating/rmse": float("nan")}
EVENT = {"kind": "micro", "task": "click", "depth": 9.0, "length": 3, "recovered_at": 12, "judged_at": 30}


def run_folder(path: Path, **config: Any) -> RunFolder:
    folder = RunFolder(path)
    optim = {"name": "clippy", "_target_": "optim.build_optimizer", "lambda_rel": 0.5}
    cfg = {"optim": optim, "model": {"name": "small"}, "scale": {"batch_size": 256}, "seed": 3, **config}
    folder.save_config(OmegaConf.create(cfg))
    return folder


def card(folder: RunFolder, **options: Any) -> dict[str, Any]:
    return card_of(folder, log=LOG, step=8, checkpoint="the last one", **({"metrics": METRICS} | options))


def test_a_finished_run_is_described_in_full(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, warm_start={"parent": {"run": "yesterday", "steps": 100}})
    folder.save_summary({"status": "completed", "reason": "", "lr": 0.2, "examples": 2048, "commit": "abc"})
    for step in (4, 12):
        folder.append_event(EVENT | {"step": step, "reason": f"the loss | of click <rose> at {step}"})

    found = card(
        folder,
        gate={"passed": False, "checks": [{"rule": "min_auc", "about": "click", "passed": False, "words": "0.6"}]},
    )

    write_card(tmp_path, found)
    assert json.loads((tmp_path / CARD).read_text()) == found
    assert [event["step"] for event in found["events"]] == [4], "what came after these weights is not theirs"
    assert found["parent"] == {"run": "yesterday", "steps": 100}
    assert found["metrics"]["rating/rmse"] is None
    assert [found["data"][part]["rows"] for part in ("training", "hold_out")] == [2048, 512]
    text = (tmp_path / CARD_TEXT).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["tags"] == ["ranking", "recommender", "small", "clippy"]
    for line in (
        "| click | 0.7512 | 512 |  |",
        "| rating |  |  | undefined |",
        "| min_auc | click | refused | 0.6 |",
        "| 4 | micro | click | the loss \\| of click &lt;rose> at 4 |",
        "| lambda_rel | 0.5 |",
        "| learning rate | 0.2 |",
        "| commit | abc |",
    ):
        assert line in text, line


def test_a_run_that_was_killed_has_a_card_too(tmp_path: Path) -> None:
    found = card(run_folder(tmp_path), metrics={})

    assert (found["status"], found["parent"], found["gate"], found["events"]) == ("running", None, None, [])
    text = as_markdown(found)
    assert "None: the run was not evaluated at this step." in text
    assert "Rows trained on: undefined." in text


def test_a_log_without_hold_out_has_a_span() -> None:
    class Short:
        train_rows = num_rows = 2048
        time_at_row = LOG.time_at_row

    span = span_of(Short())  # type: ignore[arg-type]
    assert span["hold_out"] == {"rows": 0}
    assert span["training"]["from"] < span["training"]["to"]


def test_a_changed_card_of_an_export_is_noticed(tmp_path: Path) -> None:
    found = card(run_folder(tmp_path / "run"))
    export = tmp_path / "export"
    export.mkdir()
    write_card(export, found)
    write_checksums(export)
    check_files(export)

    (export / CARD_TEXT).write_text((export / CARD_TEXT).read_text().replace("0.7512", "0.9512"))
    with pytest.raises(UserError, match=r"MODEL_CARD.md is damaged or was changed"):
        check_files(export)
