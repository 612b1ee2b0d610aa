"""``python scripts/daily.py`` as a process: killed with SIGKILL again and again, it ends with the same weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from daily_log import SETTINGS, name_of, write_day, write_log
from ranker.runs.checkpoint_files import by_step
from support import ROOT, assert_equal


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    gate = ["daily.gate=default", "daily.max_auc_drop=1"]
    own = [f"data.source={folder / 'log'}", f"daily.dir={folder / 'daily'}", *gate, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "daily.py"), *SETTINGS, *own],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def verdicts(folder: Path) -> list[str]:
    path = folder / "daily" / "days.jsonl"
    return [json.loads(line)["verdict"] for line in path.read_text().splitlines()] if path.is_file() else []


def weights(folder: Path, day: int) -> dict[str, torch.Tensor]:
    runs = folder / "daily" / "runs" / name_of(day)
    plan = json.loads((runs / "plan.json").read_text())
    assert plan["day"] == name_of(day)
    state = folder / "daily" / "states" / name_of(day) / "checkpoints"
    return torch.load(by_step(state)[-1], weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        write_log(tmp_path / name / "log", 3)
    whole = start(tmp_path / "whole", "train.epochs=8")
    said = whole.communicate(timeout=900)[0]
    assert whole.returncode == 0, said
    assert verdicts(tmp_path / "whole") == ["promoted", "promoted"], said
    draw, kills = random.Random(0), 0
    while True:
        process = start(tmp_path / "killed", "train.epochs=8")
        began = time.monotonic()
        patience = 10 + draw.random() * 40 if kills < 6 else 900
        while process.poll() is None and time.monotonic() - began < patience:
            time.sleep(0.1)
        if process.poll() is not None:
            said = process.communicate()[0]
            assert process.returncode == 0, said
            break
        kills += 1
        if kills % 3:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # the run that it started is left behind, and the next call waits for it
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert kills
    assert verdicts(tmp_path / "killed") == ["promoted", "promoted"]
    for day in (0, 1):
        assert_equal(weights(tmp_path / "whole", day), weights(tmp_path / "killed", day), name_of(day))
    served = tmp_path / "killed" / "daily" / "serving"
    assert (served / "model.pt2").is_file()
    assert os.readlink(served) == f"models/{name_of(1)}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_watching_finds_a_new_day_and_ends_on_a_signal(tmp_path: Path) -> None:
    write_log(tmp_path / "log", 2)
    process = start(tmp_path, "--watch", "1", "train.epochs=8")
    try:
        for day in (2, None):
            deadline = time.monotonic() + 400
            while len(verdicts(tmp_path)) < (1 if day else 2):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.2)
            if day:
                write_day(tmp_path / "log", day)
    finally:
        process.terminate()
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM; the same command goes on" in said
