"""Runs whose tables admit and forget ids: resumed, on two ranks, replayed, warm-started and exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import daily_log
from ranker.commands.export_commands import export, score
from ranker.data.parquet_log import ParquetLog
from ranker.models import SharedBottom
from support import TWO_RANKS, Finished, assert_equal, finished, metrics, newest_checkpoint, train_process

Command = Callable[..., None]

DAY_MS = 86_400_000
SCHEMA = """
name: ids
time_column: ts
dense:
- {name: price}
categorical:
- {name: user, hash_buckets: 300, embedding_dim: 4, admit_after: 3, evict_after_days: 1.5}
- {name: country, vocabulary: [de, fr], embedding_dim: 4}
- {name: history, kind: sequence, table: user, embedding_dim: 4}
tasks:
- {name: click}
"""
SETTINGS = (
    "data=parquet",
    "logger=csv",
    "trainer=cpu",
    "train.threads=1",
    "train.log_every=1",
    "train.checkpoint_every=10",
    "train.eval_every=0",
    "train.warmup_steps=0",
    "scale.batch_size=64",
    "data.window=128",
    "optim=adagrad",
    "++model.widths.small.laptop=[8,8]",
)  # 25 steps


NO_GATE = (
    *("--min-auc=0", "--min-judged=0", "--max-auc-drop=1", "--max-relative-loss=99"),
    *("--min-calibration=0", "--max-calibration=99"),
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log")
    (root / "schema.yaml").write_text(SCHEMA)
    for day in range(5):
        draw = np.random.default_rng(day)
        # Users of a day come from a part of the ids, which comes again three days later; the last day has new ones.
        users = draw.integers(0, 60 if day < 4 else 120, 400) + 1000 * (day % 3)
        price = draw.random(400)
        table = pa.table(
            {
                "ts": (19_675 + day) * DAY_MS + np.arange(400) * 200_000,
                "price": price,
                "user": users,
                "country": [("de", "fr")[i % 2] for i in range(400)],
                "history": [[int(u), int(u) + 7][: i % 3] for i, u in enumerate(users)],
                "click": (draw.random(400) < price).astype(np.int8),
            }
        )
        folder = root / f"date=2023-11-{14 + day}"
        folder.mkdir()
        for part in range(2):
            pq.write_table(table[200 * part : 200 * part + 200], folder / f"part-{part}.parquet")
    return root


@pytest.fixture(scope="module")
def whole(command_line: Command, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("whole")
    command_line(*SETTINGS, f"data.source={log}", f"hydra.run.dir={folder}")
    return finished(folder)


def ids(folder: Path) -> list[dict[str, float]]:
    return [
        {k: float(v) for k, v in row.items() if k.startswith("ids/")}
        for row in metrics(folder)
        if "ids/user/seen" in row
    ]


def test_a_run_says_what_it_admits_and_forgets(whole: Finished) -> None:
    rows = ids(whole.folder)
    assert len(rows) == 25
    assert 0 < rows[0]["ids/user/admitted"] < rows[-1]["ids/user/admitted"] <= 1
    assert rows[0]["ids/user/evicted"] == 0 < rows[-1]["ids/user/evicted"]
    state = newest_checkpoint(whole.folder)["state_dict"]
    assert state["net.embeddings.admission.totals"][0].tolist() == [rows[-1]["ids/user/seen"], *_rest(state)]


def _rest(state: dict[str, torch.Tensor]) -> list[int]:
    seen, totals = state["net.embeddings.admission.seen_4"], state["net.embeddings.admission.totals"][0]
    return [int((seen[:301] >= 3).sum()), int(totals[2])]


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(
    command_line: Command, whole: Finished, log: Path, tmp_path: Path
) -> None:
    command_line(*SETTINGS, f"data.source={log}", f"hydra.run.dir={tmp_path}", "train.max_steps=13")
    command_line(f"resume={tmp_path}", "train.max_steps=-1")
    expected, got = newest_checkpoint(whole.folder), newest_checkpoint(tmp_path)
    for part in ("state_dict", "optimizer_states"):
        assert_equal(expected[part], got[part], part)
    assert ids(tmp_path) == ids(whole.folder)


@pytest.mark.slow
def test_two_ranks_decide_as_one(whole: Finished, log: Path, tmp_path: Path) -> None:
    process = train_process(*SETTINGS, *TWO_RANKS, f"data.source={log}", f"hydra.run.dir={tmp_path}")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert ids(tmp_path) == ids(whole.folder)
    one, two = (newest_checkpoint(folder)["state_dict"] for folder in (whole.folder, tmp_path))
    for name in one:
        if ".admission." in name:
            assert torch.equal(one[name], two[name]), name
    assert torch.allclose(
        one["net.embeddings.tables.dim_4.weight"], two["net.embeddings.tables.dim_4.weight"], atol=1e-4
    )


@pytest.mark.slow
def test_days_in_runs_of_their_own_end_with_the_bits_of_one_run(command_line: Command, tmp_path: Path) -> None:
    root = daily_log.write_log(tmp_path / "log", 4)
    rule = "num_embeddings: 100, admit_after: 9, evict_after_days: 0.3"
    (root / "schema.yaml").write_text(daily_log.SCHEMA.replace("num_embeddings: 100", rule))
    name, folder = daily_log.name_of, tmp_path / "endless"
    shared = (*daily_log.SETTINGS, f"data.source={root}")
    command_line(*shared, f"data.days=[{name(0)},{name(3)}]", f"hydra.run.dir={folder}")
    expected, more = newest_checkpoint(folder), ()
    for day in range(3):
        folder = tmp_path / str(day)
        command_line(*shared, f"data.days=[{name(day)},{name(day + 1)}]", f"hydra.run.dir={folder}", *more)
        more = (f"warm_start={folder}",)
    got = newest_checkpoint(folder)
    for each in (expected, got):
        each["state_dict"].pop("net.embeddings.admission.window")  # each run numbers its own
    assert_equal(expected["state_dict"], got["state_dict"])
    assert expected["state_dict"]["net.embeddings.admission.totals"][0, 2] > 5, "rows that were evicted"


@pytest.mark.slow
def test_weights_that_were_trained_without_counting_stay_in_use(
    command_line: Command, log: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(log, old)
    rule = ", admit_after: 3, evict_after_days: 1.5"
    (old / "schema.yaml").write_text(SCHEMA.replace(rule, ""))
    shared = (*SETTINGS, "data.hold_out=0.2")
    command_line(*shared, f"data.source={old}", f"hydra.run.dir={tmp_path / 'first'}", "train.max_steps=10")
    run = tmp_path / "second"
    command_line(
        *shared, f"data.source={log}", f"warm_start={tmp_path / 'first'}", f"hydra.run.dir={run}", "train.max_steps=1"
    )
    seen = newest_checkpoint(run)["state_dict"]["net.embeddings.admission.seen_4"]
    assert (seen[:-3] >= 3).all(), "country has no rule"
    assert ids(run)[0]["ids/user/evicted"] == 0


def test_a_table_that_gets_a_rule_at_a_warm_start_stays_in_use(
    command_line: Command, log: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    shutil.copytree(log, new)
    (new / "schema.yaml").write_text(
        SCHEMA.replace("[de, fr], embedding_dim: 4", "[de, fr], embedding_dim: 4, admit_after: 999")
    )
    shared, run = (*SETTINGS, "data.hold_out=0.2", "train.max_steps=1"), tmp_path / "second"
    command_line(*shared, f"data.source={log}", f"hydra.run.dir={tmp_path / 'first'}")
    command_line(*shared, f"data.source={new}", f"warm_start={tmp_path / 'first'}", f"hydra.run.dir={run}")
    seen = newest_checkpoint(run)["state_dict"]["net.embeddings.admission.seen_4"]
    assert (seen[-3:] >= 999).all(), "unknown, de and fr"
    assert (seen[:-3] < 999).all()


def test_an_export_uses_the_rows_that_were_admitted(whole: Finished, log: Path, tmp_path: Path) -> None:
    assert export([str(whole.folder), "--out", str(tmp_path / "export"), *NO_GATE]) == 0
    file, scores = log / "date=2023-11-18" / "part-0.parquet", tmp_path / "scores.parquet"
    assert score([str(tmp_path / "export"), str(file), "--out", str(scores)]) == 0
    opened = ParquetLog(str(log))
    net = SharedBottom(opened.schema, hidden=[8, 8])
    state = newest_checkpoint(whole.folder)["state_dict"]
    net.load_state_dict({name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")})
    rows = opened.read(1600, 1800)
    used = net.embeddings.places(rows, 4)[0][:, 0]
    assert 0 < (used == 0).sum() < 200  # some are admitted and some are not
    with torch.no_grad():
        expected = net(rows)[:, 0].sigmoid()
    assert torch.allclose(torch.tensor(pq.read_table(scores)["click"].to_numpy()), expected, atol=1e-5)
