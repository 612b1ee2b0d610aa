"""``warm_start=``: a new run goes on from another one, and says what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from daily_log import SCHEMA, SETTINGS, name_of, write_log
from ranker.commands.export_commands import export
from ranker.runs.checkpoint_files import by_step
from support import TWO_RANKS, assert_equal, finished, metrics, train_process

Command = Callable[..., None]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), 4)


def last_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(by_step(folder / "checkpoints")[-1], weights_only=True)


def train(command: Command, log: Path, folder: Path, first: int, last: int, *words: str) -> Path:
    """Trains on days first .. last and evaluates on the day after."""
    days = f"data.days=[{name_of(first)},{name_of(last + 1)}]"
    command(*SETTINGS, f"data.source={log}", days, f"hydra.run.dir={folder}", *words)
    return folder


@pytest.fixture(scope="module")
def yesterday(command_line: Command, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(command_line, log, tmp_path_factory.mktemp("yesterday"), 0, 0)


def state_of(checkpoint: dict[str, Any]) -> dict[Any, Any]:
    """The optimizer's state without ``clip_stats``, which are of a run."""
    state = checkpoint["optimizer_states"][0]["state"]
    return {number: {key: x for key, x in values.items() if key != "clip_stats"} for number, values in state.items()}


def detector_of(folder: Path) -> dict[str, Any]:
    return last_checkpoint(folder)["callbacks"]["Stability"]["detector"]["classifier"]


@pytest.mark.parametrize(
    "words",
    [
        ("data.dense_statistics=past_windows", "train.warmup_steps=25"),
        pytest.param(("optim=clippy_adam",), marks=pytest.mark.slow),
        pytest.param(("optim=adagrad", "model=moe", "++model.widths.moe.laptop=[8,8]"), marks=pytest.mark.slow),
    ],
    ids=["statistics and warm-up", "adam", "moe"],
)
def test_the_boundary_between_days_is_invisible(
    command_line: Command, log: Path, tmp_path: Path, words: Sequence[str]
) -> None:
    endless = train(command_line, log, tmp_path / "endless", 0, 2, *words)
    parent = train(command_line, log, tmp_path / "0", 0, 0, *words)
    for day in (1, 2):
        parent = train(command_line, log, tmp_path / str(day), day, day, f"warm_start={parent}", *words)
    expected, got = last_checkpoint(endless), last_checkpoint(parent)
    for part in ("state_dict", "train_auc_by_rank"):
        assert_equal(expected[part], got[part], part)
    assert_equal(state_of(expected), state_of(got))
    assert finished(endless).summary["metrics"] == finished(parent).summary["metrics"]
    for part in ("steps", "windows", "rows", "last_time_ms"):
        assert expected["lineage"][part] == got["lineage"][part]
    once, daily = detector_of(endless), detector_of(parent)
    earlier = expected["lineage"]["steps"] - got["global_step"]
    assert_equal(once["tasks"]["click"]["baseline"], daily["tasks"]["click"]["baseline"])
    assert once["auc"]["best"] == daily["auc"]["best"]
    assert once["step_count"] == daily["step_count"]
    assert once["step"] - earlier == daily["step"]
    of_day_3 = [row for row in metrics(endless) if int(row["step"]) > earlier and "train/loss" in row]
    assert [int(row["step"]) % 5 for row in of_day_3] == [0] * len(of_day_3)


def test_a_killed_warm_start_goes_on_exactly_without_its_parent(
    command_line: Command, log: Path, tmp_path: Path, yesterday: Path
) -> None:
    whole = train(command_line, log, tmp_path / "whole", 1, 1, f"warm_start={yesterday}")
    parent = Path(shutil.copytree(yesterday, tmp_path / "parent"))
    half = train(command_line, log, tmp_path / "half", 1, 1, f"warm_start={parent}", "train.max_steps=6")
    shutil.rmtree(parent)
    command_line(f"resume={half}", "train.max_steps=-1")
    for part in ("state_dict", "optimizer_states"):
        assert_equal(last_checkpoint(whole)[part], last_checkpoint(half)[part], part)
    summaries = [finished(folder).summary["warm_start"] for folder in (whole, half)]
    for summary in summaries:
        del summary["path"], summary["run"]
    assert summaries[0] == summaries[1]


def test_the_parent_is_named(command_line: Command, log: Path, tmp_path: Path, yesterday: Path) -> None:
    today = train(command_line, log, tmp_path / "today", 1, 1, f"warm_start={yesterday}", "train.max_steps=3")
    found = finished(today).summary
    parent = finished(yesterday).summary
    assert found["warm_start"]["run"] == yesterday.name
    assert found["warm_start"]["config_hash"] == parent["config_hash"]
    assert found["warm_start"]["step"] == parent["steps"]
    assert found["warm_start"]["last_row_time"].startswith(name_of(0))
    assert found["last_row_time"].startswith(name_of(1))
    assert found["warm_start"]["not_as_it_was"] == []


def test_rows_that_the_parent_has_seen_are_warned_of(
    command_line: Command, log: Path, tmp_path: Path, yesterday: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(command_line, log, tmp_path / "new", 1, 1, f"warm_start={yesterday}", "train.max_steps=1")
    assert "trained on again" not in capsys.readouterr().out
    train(command_line, log, tmp_path / "both", 0, 1, f"warm_start={yesterday}", "train.max_steps=1")
    seen, rows = finished(yesterday).summary["examples"], 2 * finished(yesterday).summary["examples"]
    assert f"{seen:,} of {rows:,} training rows are from before the last row of the parent" in capsys.readouterr().out


STILL = ("train.max_steps=1", "lr_mult=1e-30", "warm_start.warmup_steps=10")  # nothing moves in one step


@pytest.fixture(scope="module")
def kept(command_line: Command, log: Path, yesterday: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A day that takes the accumulators over as they are."""
    return train(command_line, log, tmp_path_factory.mktemp("kept"), 1, 1, f"warm_start={yesterday}", *STILL)


@pytest.mark.parametrize("how", ["reset", "decay", "floor"])
def test_accumulators_by_choice(
    command_line: Command, log: Path, tmp_path: Path, yesterday: Path, kept: Path, how: str
) -> None:
    rows = finished(yesterday).summary["examples"]
    words = {"reset": [], "decay": [f"warm_start.half_life_rows={rows}"], "floor": ["warm_start.floor=2"]}[how]
    given = (f"warm_start={yesterday}", f"warm_start.accumulators={how}")
    today = train(command_line, log, tmp_path / "t", 1, 1, *given, *words, *STILL)
    state, as_kept, before = (last_checkpoint(folder) for folder in (today, kept, yesterday))
    assert_equal(before["state_dict"]["net.bottom.layers.0.weight"], state["state_dict"]["net.bottom.layers.0.weight"])
    names = state["optimizer_states"][0]["param_groups"][-1]["param_names"]
    number = state["optimizer_states"][0]["param_groups"][-1]["params"][names.index("bottom.layers.0.weight")]
    now, then, old = (x["optimizer_states"][0]["state"][number]["sum"] for x in (state, as_kept, before))
    grown = then - old  # the square of the first gradient, which is the same
    start = 1e-6
    expected = {
        "reset": start + grown,
        "decay": start + (old - start) / 2 + grown,
        "floor": old.clamp_min(2 * old.median()) + grown,
    }[how]
    torch.testing.assert_close(now, expected, rtol=1e-5, atol=5e-7)
    assert finished(today).summary["lr"] == pytest.approx(1e-31)


def test_new_rows_words_features_and_tasks_start_fresh_and_are_listed(
    command_line: Command, log: Path, tmp_path: Path, yesterday: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = Path(shutil.copytree(log, tmp_path / "log"))
    schema = SCHEMA.replace("num_embeddings: 100", "num_embeddings: 120").replace("[a, b, c]", "[c, d, a]")
    schema = schema.replace("- {name: price}\n", "- {name: watch_before, column: watch}\n- {name: price}\n")
    schema = schema.replace("- {name: click}\n", "- {name: long, column: watch, at_least: 2}\n- {name: click}\n")
    (changed / "schema.yaml").write_text(schema)
    capsys.readouterr()
    today = train(command_line, changed, tmp_path / "today", 1, 1, f"warm_start={yesterday}", *STILL)
    said = capsys.readouterr().out
    for line in (
        "task 'long' is new",
        "the table of 'user': 20 new rows",
        "the table of 'shop': 1 new words",
        "feature 'watch_before', which is new",
    ):
        assert "warm start: starts fresh: " in said
        assert line in said
        assert any(line in listed for listed in finished(today).summary["warm_start"]["not_as_it_was"])
    now, old = last_checkpoint(today)["state_dict"], last_checkpoint(yesterday)["state_dict"]
    table, before = (x["net.embeddings.tables.dim_4.weight"] for x in (now, old))
    assert_equal(before[:101], table[:101])  # user: null and 100 ids; then 20 new ones, then shop
    assert_equal(before[101], table[121])  # shop: null
    assert_equal(before[104], table[122])  # c
    assert_equal(before[102], table[124])  # a
    layer, first = (x["net.bottom.layers.0.weight"] for x in (now, old))
    assert_equal(first, layer[:, 1:])  # the new feature has the first column
    assert_equal(old["net.heads.linear.task_click.weight"], now["net.heads.linear.task_click.weight"])


def test_a_widened_layer_starts_fresh(command_line: Command, log: Path, tmp_path: Path, yesterday: Path) -> None:
    today = train(
        command_line,
        log,
        tmp_path / "today",
        1,
        1,
        f"warm_start={yesterday}",
        "++model.widths.small.laptop=[8,16]",
        "train.max_steps=2",
    )
    lines = finished(today).summary["warm_start"]["not_as_it_was"]
    assert any("bottom.layers.1.weight has shape [8, 8] there and [16, 8] here" in line for line in lines)
    assert not any("bottom.layers.0" in line for line in lines)
    assert any("accumulators start anew for 4 of" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["warm_start=nowhere"], "no run folder"),
        (["warm_start={run}", "data.dense_statistics=past_windows"], "its inputs have another scale"),
        (["warm_start={run}", "++model.widths.small.laptop=[9,9]"], "no layer of"),
        (["warm_start={run}", "warm_start.accumulators=decay"], "half_life_rows"),
        (["warm_start={run}", "warm_start.accumulators=kep"], "did you mean 'keep'"),
        (["warm_start={run}/config.yaml"], "not a checkpoint"),
        (["warm_start.at_windows=true", "trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=1"),
    ],
)
def test_what_does_not_fit_is_one_line(
    command_line: Command,
    log: Path,
    tmp_path: Path,
    yesterday: Path,
    capsys: pytest.CaptureFixture[str],
    words: Sequence[str],
    line: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        train(command_line, log, tmp_path / "run", 1, 1, *(word.format(run=yesterday) for word in words))
    assert ended.value.code == 2
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(said) == 1
    assert line in said[0]
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_lost_parent_is_not_continued(
    command_line: Command, log: Path, tmp_path: Path, yesterday: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = Path(shutil.copytree(yesterday, tmp_path / "lost"))
    newest = by_step(lost / "checkpoints")[-1]
    state = torch.load(newest, weights_only=True)
    event = {"kind": "full", "step": 2, "task": "click", "depth": 9.0, "length": 3, "recovered_at": None}
    classifier = state["callbacks"]["Stability"]["detector"]["classifier"]
    classifier["full_divergence"] = event | {"judged_at": 5, "reason": "made up"}
    torch.save(state, newest)
    for given in (lost, newest):
        with pytest.raises(SystemExit):
            train(command_line, log, tmp_path / "run", 1, 1, f"warm_start={given}")
        assert "diverged" in capsys.readouterr().err
    summary = json.loads((yesterday / "summary.json").read_text())
    assert summary["status"] == "completed"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_boundary_is_invisible_to_two_ranks(log: Path, tmp_path: Path) -> None:
    def train_ranks(command: str, first: int, last: int, *words: str) -> Path:
        def run(*given: str) -> None:
            process = train_process(*(word for word in given if word != "trainer=cpu"), *TWO_RANKS)
            out, err = process.communicate(timeout=600)
            assert process.returncode == 0, out + err

        return train(run, log, tmp_path / command, first, last, *words)

    endless = train_ranks("endless", 0, 1)
    parent = train_ranks("0", 0, 0)
    daily = train_ranks("1", 1, 1, f"warm_start={parent}")
    expected, got = last_checkpoint(endless), last_checkpoint(daily)
    for part in ("state_dict", "train_auc_by_rank"):
        assert_equal(expected[part], got[part], part)
    assert_equal(state_of(expected), state_of(got))


@pytest.mark.slow
def test_an_export_gives_its_weights(
    command_line: Command, log: Path, tmp_path: Path, yesterday: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lenient = ("--min-auc", "0", "--max-calibration", "9", "--max-relative-loss", "9")
    assert export([str(yesterday), "--out", str(tmp_path / "export"), *lenient]) == 0
    given = f"warm_start={tmp_path / 'export'}"
    with pytest.raises(SystemExit):
        train(command_line, log, tmp_path / "kept", 1, 1, given)
    assert "add warm_start.accumulators=reset" in capsys.readouterr().err
    today = train(command_line, log, tmp_path / "today", 1, 1, given, "warm_start.accumulators=reset", *STILL)
    now, old = last_checkpoint(today), last_checkpoint(yesterday)
    for name in (name for name in now["state_dict"] if name.startswith("net.")):
        assert_equal(old["state_dict"][name], now["state_dict"][name], name)
    assert finished(today).summary["warm_start"]["kind"] == "export"
    assert now["lineage"]["windows"] == old["lineage"]["windows"] + 1


@pytest.mark.parametrize(
    "words",
    [
        ("warm_start.accumulators=decay", "warm_start.half_life_rows=900", "train.warmup_steps=25"),
        pytest.param(
            ("warm_start.accumulators=reset", "warm_start.warmup_steps=6", "optim=clippy_adam"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("warm_start.accumulators=floor", "optim=gc"), marks=pytest.mark.slow),
        pytest.param(("warm_start.accumulators=keep", "warm_start.warmup_steps=6"), marks=pytest.mark.slow),
        pytest.param(("warm_start.accumulators=reset", "optim=adagrad"), marks=pytest.mark.slow),
    ],
    ids=["decay", "reset and warm-up, adam", "floor", "warm-up", "reset"],
)
def test_boundaries_inside_a_run_do_what_warm_starts_do_between_runs(
    command_line: Command, log: Path, tmp_path: Path, words: Sequence[str]
) -> None:
    by_day = (*words, "data.window=24h")
    parent = train(command_line, log, tmp_path / "0", 0, 0, *by_day)
    for day in (1, 2):
        parent = train(command_line, log, tmp_path / str(day), day, day, f"warm_start={parent}", *by_day)
    inside = (*by_day, "warm_start.at_windows=true", "train.checkpoint_every=0")
    whole = train(command_line, log, tmp_path / "whole", 0, 2, *inside)
    half = train(command_line, log, tmp_path / "half", 0, 2, *inside, "train.max_steps=13")  # 10 steps are a day
    command_line(f"resume={half}", "train.max_steps=-1")
    steps = last_checkpoint(whole)["global_step"]
    for folder in (whole, half):
        got = last_checkpoint(folder)
        assert got["global_step"] == steps == 30
        assert_equal(last_checkpoint(parent)["state_dict"], got["state_dict"], folder.name)
        assert_equal(state_of(last_checkpoint(parent)), state_of(got), folder.name)
    assert finished(whole).summary["metrics"] == finished(parent).summary["metrics"]
    rates = {int(row["step"]): float(row["lr"]) for row in metrics(whole) if row.get("lr")}
    of_chain = {int(row["step"]) + 20: float(row["lr"]) for row in metrics(parent) if row.get("lr")}
    assert of_chain.items() <= rates.items()
