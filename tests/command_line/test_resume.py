"""``resume=``: it applies what it records, or refuses before it writes anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from ranker import config
from ranker.config_overrides import resumed
from ranker.runs.checkpoint_files import by_step
from support import ROOT, Finished, assert_equal, finished, metrics

Command = Callable[..., None]

DAY_MS = 86_400_000
SCHEMA = """
name: own
time_column: ts
dense:
- {name: price}
- {name: age}
categorical:
- {name: user, num_embeddings: 100, embedding_dim: 4}
tasks:
- {name: click}
- {name: watch, type: regression}
"""
SETTINGS = (
    "data=parquet",
    "logger=csv",
    "trainer=cpu",
    "train.threads=1",
    "train.log_every=1",
    "train.checkpoint_every=5",
    "train.eval_every=5",
    "train.warmup_steps=0",
    "scale.batch_size=64",
    "data.window=128",
    "++model.widths.small.laptop=[8,8]",
)  # 13 steps


def write_day(root: Path, day: int) -> None:
    draw = np.random.default_rng(day)
    price = draw.random(400)
    pl.DataFrame(
        {
            "ts": (19_675 + day) * DAY_MS + np.arange(400) * 100_000,
            "price": price,
            "age": draw.random(400),
            "user": draw.integers(0, 100, 400),
            "click": (draw.random(400) < price).astype(np.int8),
            "watch": draw.lognormal(0, 1, 400),
        }
    ).write_parquet(root / f"day={day}.parquet")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("log")
    (root / "schema.yaml").write_text(SCHEMA)
    for day in range(3):
        write_day(root, day)
    return root


@pytest.fixture(scope="module")
def whole(command_line: Command, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("whole")
    command_line(*SETTINGS, f"data.source={log}", f"hydra.run.dir={folder}")
    return finished(folder)


@pytest.fixture(scope="module")
def half(command_line: Command, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    command_line(*SETTINGS, f"data.source={log}", "train.max_steps=8", f"hydra.run.dir={folder}")
    return folder


@pytest.fixture
def cut(half: Path, tmp_path: Path) -> Path:
    """A copy of a run that took 8 of its 13 steps."""
    return Path(shutil.copytree(half, tmp_path / "cut"))


def contents(folder: Path) -> dict[str, bytes]:
    """All files that a run writes, without the lock and the log of the process."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "train.log"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def last_checkpoint(folder: Path) -> dict[str, object]:
    return torch.load(by_step(folder / "checkpoints")[-1], weights_only=True)


def assert_same_end(one: Path, other: Path) -> None:
    expected, got = last_checkpoint(one), last_checkpoint(other)
    for part in ("global_step", "state_dict", "optimizer_states"):
        assert_equal(expected[part], got[part], part)
    for name in ("status", "metrics", "steps", "examples"):
        assert finished(one).summary[name] == finished(other).summary[name], name


def test_a_completed_run_keeps_the_weights_that_its_summary_reports(whole: Finished) -> None:
    assert [path.name for path in by_step(whole.folder / "checkpoints")][-2:] == ["step=10.ckpt", "step=13.ckpt"]
    assert whole.summary["steps"] == last_checkpoint(whole.folder)["global_step"] == 13
    values = {int(row["step"]): float(row["val/click/auc"]) for row in metrics(whole.folder) if "val/click/auc" in row}
    best = json.loads((whole.folder / "checkpoints" / "best" / "best.json").read_text())
    step = max(values, key=values.__getitem__)
    assert best == {"metric": "val/click/auc", "step": step, "value": values[step]}
    (kept,) = (whole.folder / "checkpoints" / "best").glob("*.ckpt")
    assert torch.load(kept, weights_only=True)["global_step"] == best["step"]


def test_a_run_of_fewer_steps_goes_on_as_if_it_had_not_ended(command_line: Command, whole: Finished, cut: Path) -> None:
    command_line(f"resume={cut}", "train.max_steps=-1")

    assert_same_end(whole.folder, cut)


def test_a_finished_run_is_not_trained_again(
    command_line: Command, whole: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(whole.folder, tmp_path / "copy"))
    before = contents(copy)

    command_line(f"resume={copy}")

    assert "nothing is left to train after step 13: every row of the log was trained on" in capsys.readouterr().out
    assert contents(copy) == before
    (copy / "summary.json").unlink()  # killed in the last evaluation
    command_line(f"resume={copy}")
    assert_same_end(whole.folder, copy)
    assert metrics(copy) == metrics(whole.folder)


def test_a_run_killed_between_a_checkpoint_and_its_evaluation_makes_the_evaluation_up(
    command_line: Command, whole: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = Path(shutil.copytree(whole.folder, tmp_path / "killed"))
    (killed / "summary.json").unlink()
    rows = pl.read_csv(killed / "metrics.csv", infer_schema=False)
    values = [name for name in rows.columns if name.startswith("val/")]
    empty = [pl.when(step=10).then(None).otherwise(pl.col(name)).alias(name) for name in values]
    rows.with_columns(pl.col("step").cast(int)).with_columns(empty).write_csv(killed / "metrics.csv")
    last = by_step(killed / "checkpoints")[-1]
    last.write_bytes(last.read_bytes()[:1000])  # and while the next checkpoint was written, by another program

    command_line(f"resume={killed}")

    assert "step=13.ckpt is truncated" in capsys.readouterr().err
    assert metrics(killed) == metrics(whole.folder)
    assert_same_end(whole.folder, killed)


REFUSED = [
    ("model.net.hidden=[8]", "model.net.hidden is [8, 8] and cannot change when a run resumes"),
    ("seed=7", "seed is 0 and cannot change"),
    ("scale.batch_size=32", "scale.batch_size is 64 and cannot change"),
    ("data.window=64", "data.window is 128 and cannot change"),
    ("train.warmup_steps=5", "train.warmup_steps is 0 and cannot change"),
    ("model=large", "'model=large' would start another run"),
    ("optim=agc", "'optim=agc' would start another run"),
    ("optim.initial_accumulator_value=1", "initial_accumulator_value cannot change in a resumed run (1e-06"),
    ("optim.embedding.method=gc", "method cannot change in a resumed run (adagrad"),
    ("optim.lambda_rel=-1", "lambda_rel"),
    ("lr_mult=0", "lr_mult must be a number above 0"),
    ("data.sauce=x", "unknown option 'data.sauce'; did you mean 'source'"),
    ("data.source=/nowhere", "/nowhere"),
    ("data.source=GROWN", "day=3.parquet is new"),
    ("data.source=CHANGED", "day=1.parquet has other rows"),
    ("data.source=SWAPPED", "the order of dense is price, age in the run and age, price now"),
    ("data.source=TRANSFORMED", "'price' of dense is {'name': 'price'} in the run"),
]


def test_a_refused_resume_leaves_the_folder_as_it_was(
    command_line: Command, log: Path, cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("grown", "changed", "swapped", "transformed")
    logs = {name: Path(shutil.copytree(log, tmp_path / name)) for name in names}
    write_day(logs["grown"], 3)
    pl.read_parquet(logs["changed"] / "day=1.parquet").with_columns(price=0.5).write_parquet(
        logs["changed"] / "day=1.parquet"
    )
    dense = "- {name: price}\n- {name: age}\n"
    (logs["swapped"] / "schema.yaml").write_text(SCHEMA.replace(dense, "- {name: age}\n- {name: price}\n"))
    changed = SCHEMA.replace("{name: price}", "{name: price, transform: log1p}")
    (logs["transformed"] / "schema.yaml").write_text(changed)
    before = contents(cut)

    for override, told in REFUSED:
        key, value = override.split("=", 1)
        with pytest.raises(SystemExit) as stop:
            command_line(f"resume={cut}", "train.max_steps=-1", f"{key}={logs.get(value.lower(), value)}")
        lines = capsys.readouterr().err.strip().splitlines()
        assert (stop.value.code, len(lines)) == (2, 2), lines
        assert told in lines[0]
        assert contents(cut) == before, override


def test_what_can_change_is_applied_and_recorded_also_for_the_next_resume(
    command_line: Command, log: Path, cut: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(log, tmp_path / "moved"))

    for limit in (10, -1):  # the second time without the overrides
        changes = (f"data.root={moved}", "data.on_bad_rows=drop", "lr_mult=0.5", "optim.lambda_rel=0.25")
        command_line(f"resume={cut}", f"train.max_steps={limit}", *(changes if limit > 0 else ()))

    saved = yaml.safe_load((cut / "config.yaml").read_text())
    assert (saved["data"]["log"]["root"], saved["data"]["log"]["on_bad_rows"]) == (str(moved), "drop")
    assert (saved["lr"], finished(cut).summary["lr"]) == (0.05, 0.05)
    rates = {int(row["step"]): float(row["lr"]) for row in metrics(cut) if "lr" in row}
    assert [rates[step] for step in (7, 8, 9, 13)] == [0.1, 0.1, 0.05, 0.05]
    tables, rest = last_checkpoint(cut)["optimizer_states"][0]["param_groups"]  # type: ignore[index]
    assert (tables["lr"], rest["lr"], rest["lambda_rel"]) == (0.05, 0.05, 0.25)


def test_another_trainer_changes_where_a_run_goes_on_and_not_what_a_step_is() -> None:
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        saved = compose("config", overrides=["trainer=ddp", "trainer.devices=2", "trainer.accumulate_grad_batches=3"])
        cfg = compose("config", overrides=["resume=runs/x", "trainer=cpu"])

    found = resumed(cfg, saved, ["resume=runs/x", "trainer=cpu"], conf=ROOT / "conf").trainer

    assert (found.accelerator, found.devices, found.strategy) == ("cpu", 1, "auto")
    assert found.accumulate_grad_batches == 3


def test_a_new_run_in_a_used_folder_is_refused_or_clears_it(
    command_line: Command, log: Path, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*SETTINGS, f"data.source={log}", "train.max_steps=2", f"hydra.run.dir={cut}")
    (cut / "notes.txt").write_text("mine")
    before = contents(cut)

    with pytest.raises(SystemExit):
        command_line(*settings)
    assert f"{cut} holds a run already; go on with it with resume={cut}" in capsys.readouterr().err
    after = contents(cut)
    assert {name: after[name] for name in before if not name.startswith(".hydra")} == {
        name: before[name] for name in before if not name.startswith(".hydra")
    }

    command_line(*settings, "force=true")
    assert finished(cut).summary["steps"] == 2
    assert [path.name for path in by_step(cut / "checkpoints")] == ["step=2.ckpt"]
    assert not (cut / "checkpoints" / "best").exists()
    assert [int(row["step"]) for row in metrics(cut) if "lr" in row] == [1, 2]
    assert (cut / "notes.txt").read_text() == "mine"
