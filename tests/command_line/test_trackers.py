"""What the trackers show of a run is what metrics.csv has, also of one that was killed and resumed."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from support import TINY, TWO_RANKS, Finished, finished, metrics, ranks_of, train_process, wait_for
from tracked import Values, mlflow_values, tensorboard_values, wandb_records, wandb_rows, wandb_summary, wandb_values

LOGGERS = (
    "train.log_every=2",
    "train.checkpoint_every=8",
    "callbacks.early_signs.every=8",
)
READERS = {"W&B": wandb_values, "TensorBoard": tensorboard_values}


def in_csv(folder: Path) -> Values:
    return {
        (int(row["step"]), name): float(value)
        for row in metrics(folder)
        for name, value in row.items()
        if name != "step"
    }


def assert_same(expected: Values, got: Values, count: Counter[tuple[int, str]], tracker: str) -> None:
    got = {key: value for key, value in got.items() if key in expected or not key[1].startswith(("hp", "test/"))}
    assert set(got) == set(expected), f"{tracker}: {sorted(set(got) ^ set(expected))[:5]}"
    for key, value in expected.items():
        same = got[key] == pytest.approx(value, rel=1e-6) or (math.isnan(value) and math.isnan(got[key]))
        assert same, f"{tracker}: {key}: {got[key]} is not {value}"
    twice = [key for key in expected if count[key] != 1]
    assert not twice, f"{tracker}: {twice[:5]} more than once"


def test_a_resumed_run_is_in_every_tracker_as_if_it_had_never_stopped(
    train_tiny: Callable[..., Finished],
    command_line: Callable[..., None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    chosen = ("logger=[wandb,tensorboard]", *LOGGERS, "train.eval_every=4", "callbacks.histograms.every=4")
    train_tiny(folder, *chosen, "train.max_steps=12")
    # As a crash at step 12 leaves it: the trackers have steps 9 to 12, and the newest checkpoint is of step 8.
    (folder / "checkpoints" / "step=12.ckpt").unlink()
    shutil.rmtree(folder / "checkpoints" / "best", ignore_errors=True)
    capfd.readouterr()

    command_line(f"resume={folder}", "train.max_steps=16")

    summary = finished(folder).summary
    assert summary["status"] == "completed"
    assert "W&B has steps 9 to 12 of an earlier attempt and keeps them" in capfd.readouterr().out
    for tracker, read in READERS.items():
        assert_same(in_csv(folder), *read(folder), tracker)
    assert len(wandb_records(folder)) == 2
    rows = wandb_rows(folder)
    assert len(set(rows)) == len(rows), "no two rows of the run have the same number"
    shown, best = wandb_summary(folder), [x for (_, name), x in in_csv(folder).items() if name == "val/click/auc"]
    assert shown["val/click/auc"]["max"] == pytest.approx(max(best)), "the best value of both attempts"
    assert shown["val/click/auc"]["last"] == pytest.approx(best[-1])
    assert shown["test/click/auc"] == pytest.approx(summary["metrics"]["test/click/auc"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_of_two_ranks_is_tracked_once(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    folder = tmp_path / "run"
    chosen = ("logger=[wandb,tensorboard,mlflow]", f"logger.mlflow.tracking_uri=sqlite:///{tmp_path}/mlflow.db")
    settings = (*TINY, *TWO_RANKS, *LOGGERS, *chosen, f"hydra.run.dir={folder}")
    first = train_process(*settings)
    try:
        wait_for(lambda: len(list((folder / "checkpoints").glob("step=*.ckpt"))) > 1, first)
        ranks = ranks_of(first)
    finally:
        first.kill()
    first.communicate()
    for rank in ranks[1:]:  # it would hold the port, and may have ended by itself
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)

    second = train_process(f"resume={folder}")
    out, errors = second.communicate(timeout=300)

    assert second.returncode == 0, errors
    for tracker, read in {**READERS, "MLflow": mlflow_values}.items():
        assert_same(in_csv(folder), *read(folder), tracker)
    assert "deprecat" not in errors, "the console has no warning of a library"
    assert out.count("tracked offline") == 1
