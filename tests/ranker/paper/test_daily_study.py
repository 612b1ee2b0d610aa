"""The study of days: which runs follow which, what their folders say by day, and the tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ranker.paper import daily_runs
from ranker.paper.daily_runs import Calendar, Part, parts, read
from ranker.paper.daily_study import daily_sections, draw_daily
from ranker.paper.jobs import DATA, Setting
from ranker.paper.study import Round

SETTING = Setting(DATA["synthetic"], seeds=1)
STEPS = 10  # of a day
DAYS = 4


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(daily_runs.CALENDARS, "synthetic", Calendar(days=DAYS, rows=640))
    monkeypatch.setattr(daily_runs, "_sound", lambda path: next(iter(sorted(path.glob("checkpoints/step=*"))), None))


class Folders:
    """Writes the run folders that a launched round would leave. Naive Adagrad with resets is lost once."""

    def __init__(self, write_run: Any) -> None:
        self._write, self._number = write_run, 0
        self.lost_at = {("adagrad", "reset", 0): (13, 24)}  # first part: event on the second day, verdict on the third

    def __call__(self, made: Round, planned: list[Part]) -> None:
        for part in planned:
            self._number += 1
            cell = part.cell
            lost = self.lost_at.get((cell.optim, cell.way, part.first))
            folder = self._write(
                f"{self._number}",
                list(part.job),
                status="diverged" if lost else "completed",
                click__auc=0.6 + 0.01 * part.last,
            )
            steps = lost[1] if lost else STEPS * (part.last - part.first + 1)
            summary = json.loads((folder / "summary.json").read_text()) | {"steps": steps}
            (folder / "summary.json").write_text(json.dumps(summary))
            lines = [
                "step,window,train/loss,lr,signs/bottom_top/update_max,signs/bottom_top/sigma,progressive/click/auc"
            ]
            for step in range(steps + 1):
                if step % STEPS == 0 and step < steps:
                    lines.append(f"{step},{step // STEPS},,,,,{0.6 + 0.01 * (part.first + step // STEPS)}")
                if step:
                    first = (step - 1) % STEPS < daily_runs.FIRST_STEPS
                    lines.append(
                        f"{step},,{8.0 if first else 2.0},0.5,{1.0 if first else 0.25},{0.5 if first else 1.0},"
                    )
            (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
            if lost:
                (folder / "events.jsonl").write_text(json.dumps({"kind": "full", "step": lost[0]}) + "\n")
                (folder / "checkpoints" / f"step={STEPS}.ckpt").mkdir(parents=True)
            folder.rename(made.folder / folder.name)


@pytest.fixture
def launched(tmp_path: Path, write_run: Any) -> Path:
    launch, sweep = Folders(write_run), tmp_path / "synthetic_laptop"
    for made, planned in parts(SETTING, sweep):
        made.folder.mkdir(parents=True)
        launch(made, planned)
    return sweep


def test_a_lost_chain_goes_on_the_day_after_the_verdict_from_the_model_before_the_loss(launched: Path) -> None:
    rounds = [(made, planned) for made, planned in parts(SETTING, launched)]
    assert [made.folder.name for made, _ in rounds] == ["part_00", "part_01", "scratch"]
    (again,) = rounds[1][1]
    assert (again.cell.optim, again.cell.way, again.first, again.last) == ("adagrad", "reset", 3, 3)
    assert again.parent is not None
    (start,) = (word for word in again.job if word.startswith("warm_start.path="))
    assert start.endswith("/checkpoints/step=10.ckpt'")
    assert "warm_start.accumulators=reset" in again.job
    assert "data.log.first_day=3" in again.job

    runs, missing = read(SETTING, launched, [])
    assert missing == []
    chain = runs.filter(pl.col("optim") == "adagrad", pl.col("way") == "reset")
    assert chain["day"].to_list() == [0, 1, 2, 3]
    assert chain["status"].to_list() == ["completed", "lost", "lost", "completed"]
    assert chain["event_step"].to_list() == [None, 3, None, None]
    # On the third day the log served the model from before the loss, which the lost run did not score.
    assert chain["auc"].to_list() == [None, 0.61, None, 0.63]
    assert chain["fresh"].to_list() == [True, False, False, False]
    assert chain["auc_after"].to_list() == [None, None, None, 0.63]
    row = chain.row(3, named=True)
    assert (row["loss_first"], row["loss_rest"]) == (8.0, 2.0)
    assert (row["move_first"], row["move_rest"]) == (0.25, 0.125)
    assert (row["sigma_first"], row["sigma_rest"]) == (0.5, 1.0)
    fresh = runs.filter(pl.col("way") == "scratch", pl.col("optim") == "gc")
    assert fresh.select("day", "auc", "auc_after").rows() == [(3, None, 0.63)]


def test_a_part_that_is_lost_on_its_first_day_leaves_the_model_that_it_began_with(
    tmp_path: Path, write_run: Any
) -> None:
    launch, sweep = Folders(write_run), tmp_path / "synthetic_laptop"
    launch.lost_at = {("gc", "keep", 0): (13, 18), ("gc", "keep", 2): (3, 8)}
    starts = []
    for made, planned in parts(SETTING, sweep):
        made.folder.mkdir(parents=True)
        launch(made, planned)
        for path in made.folder.glob("*/checkpoints"):
            if "first_day=2" in (path.parent / ".hydra" / "overrides.yaml").read_text():
                shutil.rmtree(path)  # no midnight before the loss
        starts += [(each.first, each.parent) for each in planned if each.cell.way == "keep" and each.cell.optim == "gc"]
    assert [first for first, _ in starts] == [0, 2, 3]
    assert starts[0][1] is None
    assert starts[1][1] == starts[2][1] is not None
    runs, _ = read(SETTING, sweep, [])
    chain = runs.filter(pl.col("optim") == "gc", pl.col("way") == "keep")
    assert chain["status"].to_list() == ["completed", "lost", "lost", "completed"]
    assert chain["auc"].to_list() == [None, 0.61, 0.62, 0.63]
    assert chain["fresh"].sum() == 1


def test_what_is_missing_is_asked_for_and_no_day_follows_it(launched: Path) -> None:
    victim = next(
        path.parent for path in (launched.with_name("synthetic_laptop_daily") / "part_00").rglob("events.jsonl")
    )
    (victim / "summary.json").unlink()
    runs, missing = read(SETTING, launched, [])
    assert len(missing) == 1
    assert "optim=adagrad" in missing[0]
    assert runs.filter(pl.col("optim") == "adagrad", pl.col("way") == "reset").is_empty()


def test_the_tables_and_the_figure(launched: Path, tmp_path: Path) -> None:
    found = {"daily": read(SETTING, launched, [])[0]}
    made = daily_sections(SETTING.data, found)
    assert "| naive Adagrad | one endless run | 0 of 1 | - | 62.50 | - |" in made["quality"]
    assert "| naive Adagrad | accumulators reset | 1 of 1 | 2 of 4 | 63.00 | - |" in made["quality"]
    assert "| naive Adagrad | accumulators reset | 1 | 1 of 1 | 3 | 2 |" in made["losses"]
    assert "| Clippy | accumulators floored | 4 | 4 | 2 | 0.5 | 1 |" in made["midnight"]
    assert "| GC | 1 to 4 | 0 of 1 | 63.00 | 63.00 |" in made["scratch"]
    assert (
        "- naive Adagrad: **accumulators reset**. AUC served: kept 62.50, 0 of 4 days lost; reset 63.00, 2 of 4 days"
        in made["recommendation"]
    )
    assert "- GC: **accumulators kept**. AUC served" in made["recommendation"]
    assert "Divergences in the first 10 steps after a reset: naive Adagrad 1 of 1." in made["recommendation"]
    draw_daily(SETTING.data, found, tmp_path / "daily")
    assert (tmp_path / "daily.svg").stat().st_size > 5000


def test_an_empty_result_says_so(tmp_path: Path) -> None:
    assert daily_sections(SETTING.data, {"daily": pl.DataFrame()}) == {"quality": "No run yet.\n"}
    draw_daily(SETTING.data, {"daily": pl.DataFrame()}, tmp_path / "daily")
    assert not (tmp_path / "daily.svg").exists()
