"""Several passes over a log with broken rows: each pass meets them, and a rollback leaves them out of each."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from broken_log import BAD, BAD_ROWS, BATCH, BATCHES, RING, ROLLBACK, SETTINGS, WINDOW, write_log
from ranker.runs.checkpoint_files import by_step
from support import ROOT, Finished, assert_equal, finished, metrics, train_process

TRUSTED = "trust=[row_recorder.RowRecorder]"  # of a resumed run
PASSES = (*SETTINGS, *RING, *ROLLBACK, "train.epochs=2", "train.progressive=true", "train.checkpoint_every=40")


def recording(folder: Path, *, kill_at: int | None = None) -> str:
    folder.mkdir(exist_ok=True)
    kill = "null" if kill_at is None else kill_at
    return f"+callbacks.rows={{_target_:row_recorder.RowRecorder,folder:'{folder}',kill_at:{kill}}}"


def rows_by_batch(folder: Path) -> dict[int, list[int]]:
    """By batch, the row ids of the last time it was trained on."""
    return dict(map(json.loads, (folder / "rank0.jsonl").read_text().splitlines()))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*PASSES, f"data.source={write_log(tmp_path_factory.mktemp('log') / 'broken')}")


@pytest.fixture(scope="module")
def whole(
    command_line: Callable[..., None], settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    folder = tmp_path_factory.mktemp("whole")
    command_line(*settings, recording(folder / "rows"), f"hydra.run.dir={folder}")
    return finished(folder)


def test_a_rollback_in_each_pass_leaves_out_the_bad_rows_of_each(whole: Finished) -> None:
    first, second = whole.summary["rollbacks"]
    assert whole.summary["status"] == "completed"
    assert (first["event_step"], second["batch"] - first["batch"]) == (BAD[0] + 1, BATCHES)
    undone = sum(record["step"] - record["to_step"] for record in (first, second))
    skipped = sum(stop - start for start, stop in (first["skipped_batches"], second["skipped_batches"]))
    assert whole.summary["steps"] == 2 * BATCHES + undone - skipped
    assert whole.summary["examples"] == BATCH * whole.summary["steps"]

    listed = np.loadtxt(whole.folder / "skipped_rows.csv", delimiter=",", skiprows=1, ndmin=2, dtype=int)
    left_out = [{row for number, start, stop in listed if number == n for row in range(start, stop)} for n in (1, 2)]
    rows = rows_by_batch(whole.folder / "rows")
    for number, record in enumerate((first, second)):
        start, stop = record["skipped_batches"]
        kept = [
            row
            for batch in range(number * BATCHES, (number + 1) * BATCHES)
            if not start <= batch < stop
            for row in rows[batch]
        ]
        assert len(kept) == len(set(kept))
        assert left_out[number] == set(range(BATCHES * BATCH)) - set(kept), "each pass: trained on once, or left out"
        assert set(range(*BAD_ROWS)) <= left_out[number]

    windows = [int(float(row["window"])) for row in metrics(whole.folder) if "window" in row]
    assert len(windows) > 50, "the windows of the first pass are scored, up to the ones left out"
    assert max(windows) < BATCHES * BATCH // WINDOW, "the second pass is not scored: its rows were trained on"


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(402, id="between the event and its verdict", marks=pytest.mark.slow),
        pytest.param(500, id="after the rollback", marks=pytest.mark.slow),
    ],
)  # of the second pass
def test_a_run_killed_in_its_second_pass_ends_as_if_it_had_not_been(
    command_line: Callable[..., None], settings: tuple[str, ...], whole: Finished, tmp_path: Path, batch: int
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    process = train_process(
        *settings, recording(killed / "rows", kill_at=batch), f"hydra.run.dir={killed}", path=ROOT / "tests"
    )
    _, errors = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (killed / "summary.json").exists()

    command_line(f"resume={killed}", TRUSTED, f"hydra.run.dir={tmp_path / 'unused'}")

    resumed = finished(killed)
    for name in ("status", "metrics", "rollbacks", "steps", "examples"):
        assert resumed.summary[name] == whole.summary[name], name
    for name in ("events.jsonl", "skipped_rows.csv", "log.json"):
        assert (killed / name).read_text() == (whole.folder / name).read_text(), name
    assert metrics(killed) == metrics(whole.folder)
    assert rows_by_batch(killed / "rows") == rows_by_batch(whole.folder / "rows")
    expected, got = (torch.load(by_step(run / "checkpoints")[-1], weights_only=True) for run in (whole.folder, killed))
    for part in ("global_step", "state_dict", "optimizer_states"):
        assert_equal(expected[part], got[part], part)


def test_a_finished_run_takes_another_pass_as_if_it_had_been_asked_for_at_once(
    command_line: Callable[..., None], settings: tuple[str, ...], whole: Finished, tmp_path: Path
) -> None:
    three = ("train.epochs=3", "callbacks.rollback.tries=3")
    command_line(*settings, *three, f"hydra.run.dir={tmp_path / 'three'}")
    grown = Path(shutil.copytree(whole.folder, tmp_path / "grown"))

    command_line(f"resume={grown}", TRUSTED, *three)

    at_once = finished(tmp_path / "three")
    for name in ("status", "metrics", "rollbacks", "steps", "examples"):
        assert finished(grown).summary[name] == at_once.summary[name], name
    assert len(at_once.summary["rollbacks"]) == 3
