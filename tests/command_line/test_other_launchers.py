"""Sweeps beyond one machine or one program: submitit's executor, and W&B's agent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps import utils as agent
from wandb.sdk.lib import config_util

from support import ROOT, TINY, train_process

SWEEP = ROOT / "docs" / "wandb_sweep.yaml"
DRAWN = {"lr_mult": 0.75, "optim.lambda_rel": 0.31, "optim.lambda_abs": 0.000012}


def command_of_agent(drawn: dict[str, Any]) -> list[str]:
    """The command line as wandb's own agent puts it together."""
    sweep = yaml.safe_load(SWEEP.read_text())
    arguments = agent.create_sweep_command_args({"args": {name: {"value": value} for name, value in drawn.items()}})
    arguments |= {"interpreter": ["python"], "program": [sweep["program"]], "env": ["/usr/bin/env"]}
    words: list[str] = []
    for word in agent.create_sweep_command(sweep["command"]):
        words += arguments[word[2:-1]] if word.startswith("${") else [word]
    return words


def test_the_sweep_file_of_wandb_searches_what_optuna_searches() -> None:
    sweep = yaml.safe_load(SWEEP.read_text())
    optuna = OmegaConf.load(ROOT / "conf" / "hparams_search" / "optuna.yaml").hydra.sweeper

    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["run_cap"] == optuna.n_trials
    for name, space in sweep["parameters"].items():
        low, high = (float(v) for v in optuna.params[name].split("interval(")[1].rstrip(")").split(","))
        assert (space["min"], space["max"]) == (low, high)
    assert sweep["parameters"].keys() == optuna.params.keys() == DRAWN.keys()


@pytest.mark.slow
def test_the_agents_command_trains_with_the_values_it_drew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, interpreter, program, *overrides = command_of_agent(DRAWN)
    assert (environment, interpreter, program) == ("/usr/bin/env", "python", "train.py")
    drawn = tmp_path / "config.yaml"
    config_util.save_config_file_from_dict(str(drawn), {name: {"value": value} for name, value in DRAWN.items()})
    for variable, value in {
        wandb.env.SWEEP_ID: "abcd1234",
        wandb.env.RUN_ID: "wxyz5678",
        wandb.env.SWEEP_PARAM_PATH: str(drawn),
    }.items():
        monkeypatch.setenv(variable, value)

    tiny = [word for word in TINY if not word.startswith("logger=")]
    short = ("train.max_steps=2", "train.eval_every=0", f"hydra.run.dir={tmp_path / 'run'}")
    process = train_process(*tiny, *short, *overrides)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors

    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert (config.model.name, config.lr_mult) == ("large", 0.75)
    assert (config.optim.lambda_rel, config.optim.lambda_abs) == (0.31, 0.000012)
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*-wxyz5678")
    inspect = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(offline)]
    found = json.loads(subprocess.run(inspect, check=True, capture_output=True, text=True).stdout)
    metric = yaml.safe_load(SWEEP.read_text())["metric"]["name"]
    assert 0 < found["summary"][metric] < 1
    assert found["state"] == "finished"


@pytest.mark.slow
def test_submitit_runs_jobs_in_processes_of_their_own_and_only_what_is_missing(
    command_line: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ("-m", *TINY, "train.max_steps=2", "train.eval_every=0", f"hydra.sweep.dir={tmp_path}")
    sweep = (*sweep, "hydra/launcher=submitit_local", "train.threads=0")
    command_line(*sweep, "seed=0")
    (first,) = tmp_path.glob("*/summary.json")
    before = first.stat().st_mtime_ns
    capsys.readouterr()

    with pytest.raises(SystemExit):
        command_line(*sweep, "seed=0,1", "lr_mult=1,-1")

    told = capsys.readouterr()
    statuses = [json.loads(path.read_text())["status"] for path in tmp_path.glob("*/summary.json")]
    assert sorted(statuses) == ["completed", "completed", "failed", "failed"]
    assert first.stat().st_mtime_ns == before
    assert "sweep: 4 of 4 jobs done (1 completed, 2 failed, 1 done before)" in told.out
    assert told.err.count("lr_mult must be a number above 0") == 2
    assert os.listdir(tmp_path / ".submitit")


@pytest.mark.slow
@pytest.mark.skipif(
    "EVENKEEL_RAY_PYTHON" not in os.environ,
    reason="Ray's launcher needs an environment of its own (docs/sweeps.md): EVENKEEL_RAY_PYTHON names its interpreter",
)
def test_ray_runs_only_what_is_missing_and_lists_what_failed(tmp_path: Path) -> None:
    def sweep(*overrides: str) -> subprocess.CompletedProcess[str]:
        options = (*TINY, "train.max_steps=2", "train.eval_every=0", f"hydra.sweep.dir={tmp_path}", "train.threads=0")
        command = [os.environ["EVENKEEL_RAY_PYTHON"], "train.py", "-m", "hydra/launcher=ray", *options, *overrides]
        return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=250)

    done = sweep("seed=0")
    assert done.returncode == 0, done.stderr
    (first,) = tmp_path.glob("*/summary.json")
    before = first.stat().st_mtime_ns

    done = sweep("seed=0,1", "lr_mult=1,-1")

    assert done.returncode == 1
    statuses = [json.loads(path.read_text())["status"] for path in tmp_path.glob("*/summary.json")]
    assert sorted(statuses) == ["completed", "completed", "failed", "failed"]
    assert first.stat().st_mtime_ns == before
    assert "sweep: 4 of 4 jobs done (1 completed, 2 failed, 1 done before)" in done.stdout
    assert done.stderr.count("lr_mult must be a number above 0") == 2
