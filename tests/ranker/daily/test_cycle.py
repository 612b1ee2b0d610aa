"""A call of daily training does what is missing, and nothing twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from daily_log import name_of, words_for, write_day, write_log
from ranker.runs import run_lock
from ranker.runs.checkpoint_files import by_step
from support import assert_equal

Call = Callable[..., int]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "daily" / "days.jsonl").read_text().splitlines()]


def served(folder: Path) -> str:
    return Path(os.readlink(folder / "daily" / "serving")).name


def state(folder: Path, day: int) -> dict[str, Any]:
    return torch.load(by_step(folder / "daily" / "states" / name_of(day) / "checkpoints")[-1], weights_only=True)


pytestmark = pytest.mark.usefixtures("easy_gate")


def test_each_new_day_is_trained_from_yesterdays_model_and_nothing_twice(
    call: Call, jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "log", 3)
    assert call() == 0
    assert [(x["day"], x["verdict"], x["parent"]) for x in lines(tmp_path)] == [
        (name_of(0), "promoted", None),
        (name_of(1), "promoted", name_of(0)),
    ]
    assert served(tmp_path) == name_of(1)
    about, card = (
        json.loads((tmp_path / "daily" / "serving" / name).read_text()) for name in ("export.json", "model_card.json")
    )
    assert (card["run"], card["step"]) == (about["run"], about["step"])
    assert card["parent"]["run"] == name_of(0)
    before = len(jobs.trained)
    assert call() == 0
    assert len(jobs.trained) == before
    assert "0 new days" in capsys.readouterr().out
    write_day(tmp_path / "log", 3)
    assert call() == 0
    assert lines(tmp_path)[-1]["parent"] == name_of(1)
    assert lines(tmp_path)[-1]["metrics"]["click/observed"] == 600
    assert lines(tmp_path)[-1]["served_before"]["click/observed"] == 600
    lineage = state(tmp_path, 2)["lineage"]
    assert (lineage["rows"], lineage["windows"]) == (1800, 6)
    page = (tmp_path / "daily" / "index.html").read_text()
    assert f"the model of <b>{name_of(2)}</b>" in page
    assert page.count("promoted</b>") == 3


@pytest.mark.slow
def test_hive_folders_first_days_and_models_that_are_kept(call: Call, jobs: Any, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 0)
    for day in range(6):
        write_day(log, day, name=f"day={name_of(day)}/part-0.parquet")
    words = (f"daily.first_day={name_of(1)}", "daily.bootstrap_days=2", "daily.keep=2", "train.max_steps=2")
    assert call(*words) == 0
    assert [(x["first"], x["day"]) for x in lines(tmp_path)] == [
        (name_of(1), name_of(2)),
        (name_of(3), name_of(3)),
        (name_of(4), name_of(4)),
    ]
    assert sorted(path.name for path in (tmp_path / "daily" / "models").iterdir()) == [name_of(3), name_of(4)]
    assert sorted(path.name for path in (tmp_path / "daily" / "states").iterdir()) == [name_of(3), name_of(4)]
    assert not list((tmp_path / "daily" / "runs").rglob("*.ckpt"))


def test_a_lost_day_is_tried_again_and_then_skipped_with_yesterdays_model(
    call: Call, jobs: Any, tmp_path: Path, lose: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "log", 4)
    lose(name_of(1), tries=3)
    retries = "daily.retries=[{lr_factor:0.5},{lr_factor:0.25,accumulators:floor,optim:adagrad}]"
    assert call(retries) == 0
    first, second, third = lines(tmp_path)
    assert (second["verdict"], second["serving"]) == ("skipped", name_of(0))
    assert [t["changes"] for t in second["tries"]] == [
        "as configured",
        "lr x 0.5",
        "lr x 0.25, accumulators floor, optim=adagrad",
    ]
    rates = [json.loads((tmp_path / "daily" / t["run"] / "summary.json").read_text()) for t in second["tries"]]
    assert [r["lr"] / first["lr"] for r in rates] == [1, 0.5, 0.25]
    assert [r["optim"] for r in rates] == ["clippy", "clippy", "adagrad"]
    assert rates[2]["warm_start"]["accumulators"] == "floor"
    assert second["served_before"]["click/observed"] == 600
    assert (third["verdict"], third["parent"]) == ("promoted", name_of(0))
    assert not (tmp_path / "daily" / "models" / name_of(1)).exists()
    assert "made up" in capsys.readouterr().out


@pytest.mark.slow
def test_a_second_try_that_lives_is_promoted(call: Call, jobs: Any, tmp_path: Path, lose: Callable[..., None]) -> None:
    write_log(tmp_path / "log", 3)
    lose(name_of(1), tries=1)
    assert call() == 0
    assert [(x["verdict"], len(x["tries"])) for x in lines(tmp_path)] == [("promoted", 1), ("promoted", 2)]
    assert lines(tmp_path)[1]["lr"] == lines(tmp_path)[0]["lr"] / 2


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the runs of a day end as lost, as often as asked."""
    import ranker.run as run

    plain = run.finish

    def these(day: str, *, tries: int) -> None:
        left = [tries]

        def finish(parts: Any, status: str, reason: str, seconds: float) -> dict[str, object]:
            if left[0] and parts.cfg.data.days[0] == day:
                left[0] -= 1
                status, reason = "diverged", "made up"
            return plain(parts, status, reason, seconds)

        monkeypatch.setattr(run, "finish", finish)

    return these


@pytest.mark.slow
def test_a_refused_model_leaves_yesterdays(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ranker.daily.judge as judge
    from ranker.stability.gate import Check, Verdict

    write_log(tmp_path / "log", 3)
    assert call() == 0
    write_day(tmp_path / "log", 3)
    bad = Check(rule="min_auc", about="click AUC", passed=False, words="far too low")
    monkeypatch.setattr(judge, "judge", lambda *_: Verdict((bad,)))
    assert call() == 0
    last = lines(tmp_path)[-1]
    assert (last["verdict"], last["reasons"], last["serving"]) == ("refused", ["click AUC: far too low"], name_of(1))
    assert served(tmp_path) == name_of(1)
    assert "far too low" in (tmp_path / "daily" / "index.html").read_text()


def test_a_model_below_the_served_one_is_refused_and_the_served_one_stays(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ranker.daily.judge as judge

    best = {"click/auc": 1.0}
    monkeypatch.setattr(judge, "_served", lambda request, _: (None if request.served is None else best, ""))
    write_log(tmp_path / "log", 3)
    assert call("daily.max_auc_drop=0.01") == 0
    assert [x["verdict"] for x in lines(tmp_path)] == ["promoted", "refused"]
    assert served(tmp_path) == name_of(0)
    assert not (tmp_path / "daily" / "states" / name_of(1)).exists()
    assert f"{name_of(1)}: refused, {name_of(0)} stays: click AUC: " in capsys.readouterr().out


def test_late_files_are_reported_once_and_not_trained_on(
    call: Call, jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "log", 3)
    assert call("train.max_steps=2") == 0
    capsys.readouterr()
    write_day(tmp_path / "log", 0, lambda rows: rows[:10], name=f"late/day={name_of(0)}.parquet")
    late = tmp_path / "log" / f"day={name_of(0)}.parquet"
    late.unlink()  # overlapping times would be refused: the day was rewritten
    assert call("train.max_steps=2") == 0
    assert f"{name_of(0)}: late: late/day={name_of(0)}.parquet came or changed" in capsys.readouterr().out
    assert call("train.max_steps=2") == 0
    assert "late:" not in capsys.readouterr().out
    assert [x["verdict"] for x in lines(tmp_path)] == ["promoted", "promoted", "late"]
    assert len(jobs.trained) == 2
    assert "Late files" in (tmp_path / "daily" / "index.html").read_text()


def test_half_a_day_is_neither_trained_on_nor_judged_on(
    call: Call, jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "log", 0)
    for day in range(3):
        half = (lambda rows: rows.head(300)) if day == 1 else (lambda rows: rows)
        write_day(log, day, half, name=f"day={name_of(day)}/part-0.parquet")
        if day != 1:
            (log / f"day={name_of(day)}" / "_SUCCESS").touch()
    assert call("daily.complete=marker") == 0
    assert jobs.trained == []
    said = capsys.readouterr().out
    assert f"0 new days; served: nothing yet ({tmp_path}/daily/index.html)" in said
    assert f"waiting: {name_of(1)}: no day={name_of(1)}/_SUCCESS yet" in said
    write_day(log, 1, lambda rows: rows.tail(300), name=f"day={name_of(1)}/part-1.parquet")
    (log / f"day={name_of(1)}" / "_SUCCESS").touch()
    assert call("daily.complete=marker") == 0
    assert [x["verdict"] for x in lines(tmp_path)] == ["promoted", "promoted"]
    assert len(lines(tmp_path)[1]["files"]) == 2, "the whole day"


def test_the_second_of_two_at_once_says_so_and_ends(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(tmp_path / "log", 2)
    (tmp_path / "daily").mkdir()
    with run_lock.held(tmp_path / "daily"):
        monkeypatch.setattr(run_lock, "_HELD", set())  # as another process would see it
        assert call() == 2
    assert "is in use by process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.days=[2023-11-14,2023-11-15]"], "data.days is set for each day"),
        (["warm_start=runs/x"], "daily.start_from=PATH"),
        (["--watch", "often"], "--watch needs seconds"),
        (["daily.on_drift=panic"], "daily.on_drift 'panic' is unknown"),
        (["daily.keeep=2"], "keeep"),
        (["daily.retries=[{lr_factor: 2}]"], "lr_factor must be above 0 and at most 1"),
        (["data.source=nowhere"], "nowhere"),
        (["--frobnicate"], "is no option"),
    ],
)
def test_a_mistake_is_one_line(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    write_log(tmp_path / "log", 2)
    assert call(*words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert line in said[0]


@pytest.mark.slow
def test_a_failed_job_leaves_what_is_served_and_is_tried_again(
    call: Call, jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "log", 2)
    assert call() == 0
    write_day(tmp_path / "log", 2)
    path = tmp_path / "log" / f"day={name_of(1)}.parquet"
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[200:260] = bytes(60)
    path.write_bytes(damaged)
    assert call() in (1, 2)
    assert served(tmp_path) == name_of(0)
    assert len(lines(tmp_path)) == 1
    path.write_bytes(good)
    assert call() == 0
    assert served(tmp_path) == name_of(1)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it."""


@pytest.mark.parametrize(
    "point",
    [
        "in training",
        "after the pointer",
        *(
            pytest.param(point, marks=pytest.mark.slow)
            for point in ("plan", "after training", "after judging", "after the state", "after the line")
        ),
    ],
)
def test_a_call_that_dies_at_any_point_goes_on_exactly(
    call: Call, jobs: Any, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    import ranker.daily.cycle as cycle
    from ranker.daily.ledger import Ledger
    from ranker.daily.shelf import Shelf

    write_log(tmp_path / "log", 3)
    places = {
        "plan": (cycle.Plan, "write"),
        "after the state": (Shelf, "keep_state"),
        "after the pointer": (Shelf, "serve"),
        "after the line": (Ledger, "append"),
    }
    with monkeypatch.context() as patched:
        if point in places:
            owner, name = places[point]
            plain, times = getattr(owner, name), [0]

            def dies(*given: Any, **named: Any) -> Any:
                found = plain(*given, **named)
                times[0] += 1
                if times[0] == 2:
                    raise Killed
                return found

            patched.setattr(owner, name, dies)
        else:
            job = "judge" if point == "after judging" else "train"
            plain_job, calls = getattr(jobs, job), [0]

            def job_dies(given: Any, output: Path) -> int:
                calls[0] += 1
                if calls[0] == 2 and point == "in training":
                    plain_job([*given, "train.max_steps=5"], output)
                    run = tmp_path / "daily" / "runs" / name_of(1) / "try=1"
                    (run / "summary.json").unlink()
                    raise Killed
                status = plain_job(given, output)
                if calls[0] == 2:
                    raise Killed
                return status

            patched.setattr(jobs, job, job_dies)
        with pytest.raises(Killed):
            call()
    if point == "in training":  # a kill would have left the configuration as it was
        config = tmp_path / "daily" / "runs" / name_of(1) / "try=1" / "config.yaml"
        config.write_text(config.read_text().replace("max_steps: 5", "max_steps: -1"))
    assert call() == 0
    assert [x["verdict"] for x in lines(tmp_path)] == ["promoted", "promoted"]
    assert served(tmp_path) == name_of(1)
    assert_equal(reference(call, jobs, tmp_path, tmp_path_factory), state(tmp_path, 1)["state_dict"])


_WEIGHTS: dict[str, Any] = {}


def reference(call: Call, jobs: Any, tmp_path: Path, factory: Any) -> dict[str, Any]:
    """The weights of a call that nothing disturbs; made once."""
    if not _WEIGHTS:
        from ranker.commands.daily_command import daily

        folder = factory.mktemp("undisturbed")
        write_log(folder / "log", 3)
        assert daily(words_for(folder), jobs=jobs) == 0
        _WEIGHTS.update(state(folder, 1)["state_dict"])
    return _WEIGHTS
