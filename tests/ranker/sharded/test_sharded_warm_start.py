"""Runs with sharded tables that begin from an earlier run, and days after days: as with local tables, to rounding."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from daily_log import SCHEMA, SETTINGS, name_of, pass_everything, words_for, write_log
from ranker.commands.daily_command import daily
from ranker.commands.export_commands import export
from ranker.daily.judge import Request, answer
from ranker.export.release import Weights
from ranker.runs.checkpoint_files import by_step
from ranker.training.warm_start import Parent
from sharded_support import command_on_ranks, ended, trained
from support import TWO_RANKS, finished

pytest.importorskip("torchrec", reason="make test-torchrec installs it and runs this")

SHARDED = ("embeddings=torchrec", "embeddings.plan=row_wise")
RESET = "warm_start.accumulators=reset"
ALONE = ("embeddings=torchrec", "embeddings.plan=table_wise")
Command = Callable[..., None]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"), 3)


def train(command: Command, log: Path, folder: Path, day: int, *words: str, last: int | None = None) -> Path:
    days = f"data.days=[{name_of(day)},{name_of((day if last is None else last) + 1)}]"
    command(*SETTINGS, f"data.source={log}", days, f"hydra.run.dir={folder}", *words)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint, and the accumulators of the tables."""
    path = by_step(folder / "checkpoints")[-1]
    held = Parent.of_checkpoint(path).optimizer
    assert held is not None
    sums = {f"{name}/sum": x["sum"] for name, x in held.items() if name.startswith("embeddings.tables.")}
    assert sums
    return {**Weights.read(path).net, **sums}


def assert_close(found: Path, expected: Path) -> None:
    got = state(found)
    for name, values in state(expected).items():
        torch.testing.assert_close(got[name], values, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def local(command_line: Command, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Day 0 with local tables, with a full copy of the tables beside the checkpoints."""
    rows = ("model.net.sparse_embeddings=true", "train.checkpoint_rows_above=1e-6")
    return train(command_line, log, tmp_path_factory.mktemp("local") / "run", 0, *rows)


@pytest.fixture(scope="module")
def ranks(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Day 0 with two processes."""
    return train(trained, log, tmp_path_factory.mktemp("ranks") / "run", 0, *SHARDED, *TWO_RANKS)


@pytest.fixture(scope="module")
def second(command_line: Command, log: Path, local: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Day 1 with local tables, after day 0 with local ones."""
    return train(command_line, log, tmp_path_factory.mktemp("second") / "run", 1, f"warm_start={local}")


def test_from_local_tables_to_sharded_ones(
    log: Path, local: Path, second: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert list((local / "checkpoints" / "full_copies").iterdir())

    run = train(trained, log, tmp_path / "run", 1, *SHARDED, *TWO_RANKS, f"warm_start={local}")

    assert_close(run, second)
    said = finished(run).summary["warm_start"]
    assert said["not_as_it_was"] == []
    assert said["tensors"] == finished(second).summary["warm_start"]["tensors"] + 1  # two tables of one width


def test_from_two_processes_to_one_under_another_plan(
    command_line: Command, log: Path, ranks: Path, second: Path, tmp_path: Path
) -> None:
    run = train(command_line, log, tmp_path / "run", 1, *ALONE, f"warm_start={ranks}")

    assert_close(run, second)


def test_from_sharded_tables_to_local_ones(
    command_line: Command, log: Path, ranks: Path, second: Path, tmp_path: Path
) -> None:
    checkpoint = by_step(ranks / "checkpoints")[-1]
    run = train(command_line, log, tmp_path / "run", 1, f"warm_start='{checkpoint}'")

    assert_close(run, second)
    assert finished(run).summary["warm_start"]["not_as_it_was"] == []


@pytest.fixture(scope="module")
def exported(ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the two processes."""
    lenient = ("--min-auc=0", "--min-judged=0", "--max-auc-drop=1", "--max-relative-loss=99")
    path = tmp_path_factory.mktemp("exported") / "export"
    assert export([str(ranks), f"--out={path}", *lenient]) == 0
    return path


@pytest.fixture(scope="module")
def anew(command_line: Command, log: Path, ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Day 1 with local tables and new accumulators, after the run of two processes."""
    return train(command_line, log, tmp_path_factory.mktemp("anew") / "run", 1, f"warm_start={ranks}", RESET)


@pytest.mark.parametrize("words", [(), ALONE], ids=["local", "one process"])
def test_from_an_export_of_sharded_tables(
    command_line: Command, log: Path, exported: Path, anew: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    run = train(command_line, log, tmp_path / "run", 1, *words, f"warm_start={exported}", RESET)

    assert_close(run, anew)
    said = finished(run).summary["warm_start"]
    assert (said["kind"], said["not_as_it_was"]) == ("export", [])


def test_from_an_export_to_two_processes(log: Path, exported: Path, anew: Path, tmp_path: Path) -> None:
    words = (*SHARDED, *TWO_RANKS, f"warm_start={exported}", RESET)
    run = train(trained, log, tmp_path / "run", 1, *words)

    assert_close(run, anew)


def test_an_export_has_no_accumulators_to_keep(
    command_line: Command, log: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(command_line, log, tmp_path / "run", 1, *ALONE, f"warm_start={exported}")

    assert "add warm_start.accumulators=reset" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["decay", pytest.param("reset", marks=pytest.mark.slow)])
def test_boundaries_inside_a_run_act_on_the_tables(command_line: Command, log: Path, tmp_path: Path, how: str) -> None:
    words = (f"warm_start.accumulators={how}", "warm_start.half_life_rows=500", "warm_start.at_windows=true")
    words = (*words, "data.window=24h", "callbacks.snapshots.every=4")

    sharded = train(command_line, log, tmp_path / "sharded", 0, *words, *ALONE, last=1)
    alone = train(command_line, log, tmp_path / "alone", 0, *words, last=1)

    assert_close(sharded, alone)


def test_what_is_not_as_it_was_is_told(
    command_line: Command, log: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").mkdir()
    for path in log.glob("*.parquet"):
        (tmp_path / "log" / path.name).symlink_to(path)
    (tmp_path / "log" / "schema.yaml").write_text(SCHEMA.replace("num_embeddings: 100", "num_embeddings: 120"))
    words = (*ALONE, "embeddings.optimizer=rowwise_adagrad", f"warm_start={local}", "train.max_steps=1")

    run = train(command_line, tmp_path / "log", tmp_path / "run", 1, *words)

    lines = [
        "starts fresh: the table of 'user': 20 new rows",
        "accumulators of 2 tables were one a weight there and are one a row here",
    ]
    assert finished(run).summary["warm_start"]["not_as_it_was"] == lines
    assert f"warm start: {lines[0]}" in capsys.readouterr().out


class OnRanks:
    """The jobs of a day: training in two processes, which are killed once if asked to; judging here."""

    def __init__(self, *, kill_in: Sequence[str] = ()) -> None:
        self.kill_in, self.kills = kill_in, 0

    def train(self, words: Sequence[str], output: Path) -> int:
        ranks = command_on_ranks(words, 2)
        run = next((Path(word.split("=", 1)[1].strip("'\"")) for word in words if "run.dir=" in word), None)
        if run is not None and run.parent.name in self.kill_in:
            while not by_step(run / "checkpoints"):
                assert all(rank.is_alive() for rank in ranks)
                time.sleep(0.01)
            for rank in ranks:
                rank.kill()
                rank.join()
            self.kills += 1
            return 137
        return ended(ranks)

    def judge(self, request: Request, output: Path) -> int:
        answer(request)
        return 0


def test_days_with_sharded_tables_killed_on_the_way(
    command_line: Command, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Alone(OnRanks):
        def train(self, words: Sequence[str], output: Path) -> int:
            command_line(*words)
            return 0

    pass_everything(monkeypatch)
    for name in ("ranks", "alone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log").symlink_to(log)
    monkeypatch.chdir(tmp_path)
    words = [*SHARDED, *TWO_RANKS]
    killed = OnRanks(kill_in=[name_of(1)])

    assert daily([*words_for(tmp_path / "ranks"), *words], jobs=killed) == 1
    assert daily([*words_for(tmp_path / "ranks"), *words], jobs=OnRanks()) == 0
    assert daily(words_for(tmp_path / "alone"), jobs=Alone()) == 0

    assert killed.kills == 1
    for name in ("ranks", "alone"):
        lines = (tmp_path / name / "daily" / "days.jsonl").read_text().splitlines()
        assert [json.loads(line)["verdict"] for line in lines] == ["promoted", "promoted"]
    states = [tmp_path / name / "daily" / "states" for name in ("ranks", "alone")]
    for day in (0, 1):
        assert_close(*(folder / name_of(day) for folder in states))
    assert not list((tmp_path / "ranks" / "daily" / "runs").rglob("*.distcp"))  # the large files of a day are gone
